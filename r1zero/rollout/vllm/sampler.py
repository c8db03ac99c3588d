"""Our sampler in the place of vLLM's: a uniform number for each token, by its place in the sample.

So the samples are those of the native engine, on any layout, and log-probs are of the whole
distribution at the sampling temperature. vLLM's own are taken after top-k and top-p, or at
temperature 1; vllm-ascend's always at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.sample.sampler import Sampler

from r1zero.models.unused import blank
from r1zero.rollout.interface import Sampling
from r1zero.rollout.sampler import sample
from r1zero.rollout.scheduler import PartialSample


@dataclass
class Drawing:
    """What is drawn at present, and how; the engine fills it in."""

    sampling: Sampling
    samples: dict[str, PartialSample] = field(default_factory=dict)  # by the name of the request


class CounterSampler(Sampler):
    """Draws a token for each row of vLLM's batch, and notes it with its log-prob."""

    def __init__(self, runner: Any, drawing: Drawing, unused: Sequence[slice]) -> None:
        """`runner` is vLLM's, which has the batch; `unused` are columns that are no tokens."""
        super().__init__()
        self._runner = runner
        self._drawing = drawing
        self._unused = unused

    def sample(
        self, logits: torch.Tensor, *vllm_settings: object, **more: object
    ) -> tuple[torch.Tensor, None]:
        """Draw from logits, fp32 [rows, V], of all TP ranks. Returns (tokens [rows], no log-probs)."""
        batch = self._runner.input_batch
        rows = len(logits)
        known = (batch.num_tokens_no_spec[:rows] - batch.num_prompt_tokens[:rows]).tolist()
        running = [self._drawing.samples[request_of(name)] for name in batch.req_ids[:rows]]
        numbers = [each.uniforms[count] for each, count in zip(running, known, strict=True)]
        uniform = torch.tensor(numbers, dtype=torch.float32, device=logits.device)
        tokens, logprobs = sample(
            blank(logits, self._unused), uniform, self._drawing.sampling, None
        )
        _note(running, known, tokens, logprobs)
        return tokens, None


def request_of(name: str) -> str:
    """The name that a request was given: vLLM may append "-" and random characters."""
    return name.partition("-")[0]


def _note(
    running: Sequence[PartialSample],
    known: Sequence[int],
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
) -> None:
    """Note what was drawn behind the tokens that each sample is known to have.

    A row that is not through its prompt, or not through its tokens after a preemption, draws, too.
    vLLM throws that away, and the next one takes its place here.
    """
    drawn = zip(running, known, tokens.tolist(), logprobs.tolist(), strict=True)
    for each, count, token, logprob in drawn:
        each.tokens[count] = token
        each.logprobs[count] = logprob
        each.count = count + 1
