"""EvalConfig: what an evaluation needs to know, in training and by itself."""

from __future__ import annotations

from dataclasses import dataclass

from r1zero.config.schema import filled
from r1zero.data.template import Template
from r1zero.models.dtype import Dtype
from r1zero.preflight.run import Run
from r1zero.rollout.interface import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Which problems are answered, how, and how answers are scored."""

    data: str  # a file, a folder or the prefix of preprocessed files
    template: Template
    samples_per_problem: int
    temperature: float  # 0: the most likely token
    top_p: float
    top_k: int  # 0 or below: no limit
    seed: int
    max_new_tokens: int
    dtype: Dtype
    reward_functions: tuple[str, ...]

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        if self.temperature == 0:
            return Sampling(1.0, 1.0, 1, self.seed)
        return Sampling(self.temperature, self.top_p, max(self.top_k, 0), self.seed)


def eval_config(run: Run) -> EvalConfig | None:
    """How a run evaluates; None when it does not."""
    if run.eval_data is None:
        return None
    training = run.config.training
    return EvalConfig(
        data=run.eval_data.path,
        template=run.template,
        samples_per_problem=training.eval_samples_per_prompt,
        temperature=filled(training.eval_temperature),
        top_p=filled(training.eval_top_p),
        top_k=filled(training.eval_top_k),
        seed=training.seed,
        max_new_tokens=run.config.response_budget,
        dtype=run.dtype,
        reward_functions=tuple(run.config.algorithm.verifier_function),
    )
