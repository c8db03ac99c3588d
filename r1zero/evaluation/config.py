"""EvalConfig: what an evaluation needs to know, in training and by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from r1zero.config.schema import EvaluationSet, Training, filled
from r1zero.data.sources import DataSource
from r1zero.data.template import Template
from r1zero.errors import BadInput, nearest
from r1zero.models.dtype import Dtype
from r1zero.preflight.run import Run
from r1zero.rollout.interface import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Which problems are answered, how, and how answers are scored."""

    name: str = ""  # of one data set beside others
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

    def told(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The scores by their keys in evaluation.jsonl: pass@1, of a named set math500/pass@1."""
        prefix = f"{self.name}/" if self.name else ""
        return {f"{prefix}{key}": value for key, value in scores.items()}


def by_set(told: Mapping[str, float], names: Collection[str]) -> dict[str, dict[str, float]]:
    """Scores that were told, by the name of their data set; those of eval_data_path are under ""."""
    found: dict[str, dict[str, float]] = {}
    for key, value in told.items():
        name, _, rest = key.partition("/")
        if name in names:
            found.setdefault(name, {})[rest] = value
        else:
            found.setdefault("", {})[key] = value
    return found


def check_waited_for(training: Training, scores: Mapping[str, float]) -> None:
    """BadInput when a score that the run waits for is not among those of its evaluation."""
    waited_for = [("training.stop_at", key) for key in training.stop_at]
    if training.keep_best is not None and training.best_score is not None:
        waited_for.append(("training.best_score", training.best_score))
    for key, score in waited_for:
        if score not in scores:
            raise BadInput(
                f"{key}: {score} is no score of the evaluation{nearest(score, scores)}; there are "
                f"{', '.join(scores)}"
            )


def eval_configs(run: Run) -> list[EvalConfig]:
    """How a run evaluates, on each of its data sets; none when it does not."""
    return [_eval_config(run, source) for source in run.eval_data]


def _eval_config(run: Run, source: DataSource) -> EvalConfig:
    training = run.config.training
    if source.name:
        chosen = training.evaluation[source.name]
    else:
        chosen = EvaluationSet(
            path=source.path,
            samples_per_prompt=training.eval_samples_per_prompt,
            temperature=training.eval_temperature,
            top_p=training.eval_top_p,
            top_k=training.eval_top_k,
        )
    return EvalConfig(
        name=source.name,
        data=source.path,
        template=run.templates[source.prompt_type],
        samples_per_problem=filled(chosen.samples_per_prompt),
        temperature=filled(chosen.temperature),
        top_p=filled(chosen.top_p),
        top_k=filled(chosen.top_k),
        seed=training.seed,
        max_new_tokens=run.config.response_budget,
        dtype=run.dtype,
        reward_functions=tuple(source.scorers),
    )
