"""The reward model: values of texts by a model with a value head, which never learns.

An outcome reward model values a response at its last token. A process reward model says at the end
of each step, where its step token stands, with which probability the step is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r1zero.algo.packing import Microbatch, WholeSample, cut_microbatches
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import in_lockstep, run_pipeline
from r1zero.types import Prompt, Sample

POSITIVE = 1  # the output of a process reward model that speaks for a step


@dataclass(frozen=True, slots=True)
class Text:
    """What a reward model reads: a prompt, and the response that is valued.

    Neighbours with equal prompts share one computation of it.
    """

    prompt: np.ndarray  # int32 [P]
    response: np.ndarray  # int32 [T], at least one token
    # Of a process reward model: places of step tokens in `response`, ascending.
    marks: Sequence[int] = ()


class RewardModel:
    """The model of the reward ranks."""

    def __init__(self, model: RoleModel, max_samples: int, max_tokens: int | None) -> None:
        """Microbatches have at most `max_samples` texts or, if given, `max_tokens` tokens."""
        assert model.shape.value_head is not None, "a model that predicts tokens has no values"
        assert model.grid.span.cp == 1, "values are not gathered over context-parallel ranks"
        self.model = model
        self.head = model.shape.value_head
        self.max_samples = max_samples
        self.max_tokens = max_tokens
        model.module.eval()

    def values(self, texts: Sequence[Text]) -> list[float]:
        """The value of each text at its last token, on all ranks of this replica's last stage; an empty
        list on others.

        No text may be longer than the positions that the model was built for.
        """
        assert self.head.step_token is None, "it values steps"
        return [float(value) for [value] in self._outputs(texts, [[-1] for _ in texts])]

    def step_probabilities(self, texts: Sequence[Text]) -> list[list[float]]:
        """At each mark of each text the probability that the step before it is right: softmax over
        the two outputs. Where and of what length as `values`."""
        assert self.head.step_token is not None, "it values whole responses"
        outputs = self._outputs(texts, [text.marks for text in texts])
        return [logits.softmax(-1)[:, POSITIVE].tolist() for logits in outputs]

    def _outputs(
        self, texts: Sequence[Text], places: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """The head's outputs at these places of each response, fp32 [places, outputs], on the host."""
        own = cut_microbatches(_samples(texts), self.max_samples, self.max_tokens)
        microbatches = in_lockstep(self.model, own)
        if not microbatches:
            return []

        def last_step(batch: Microbatch, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
            whole = self.model.full_hidden(hidden)
            if not batch.items:
                return whole.new_zeros(()), None
            counts = [len(places[item.number]) for item in batch.items]
            rows = whole[batch.logit_positions[_rows(batch, places)]]
            outputs = self.model.module.rm_head(rows.float())
            parts = outputs.cpu().split(counts)
            numbers = [item.number for item in batch.items]
            return outputs.sum(), list(zip(numbers, parts, strict=True))

        handed_back = run_pipeline(
            self.model, self.model.module, microbatches, last_step, backward=False
        )
        if not self.model.grid.is_last_stage:
            return []
        found = {number: part for pairs in handed_back for number, part in pairs}
        return [found[number] for number in range(len(texts))]


def _samples(texts: Sequence[Text]) -> list[WholeSample]:
    """The texts as packing takes them: neighbours with equal prompts have one position."""
    samples: list[WholeSample] = []
    position = -1
    for number, text in enumerate(texts):
        assert len(text.response), "a value is read at a token of the response"
        if number == 0 or not np.array_equal(text.prompt, texts[number - 1].prompt):
            position += 1
        nothing = np.empty(0, dtype=np.float32)  # nobody looks at log-probs here
        sample = Sample(text.response, nothing, truncated=False, version=0)
        samples.append(WholeSample(number, position, Prompt(position, "", text.prompt, ""), sample))
    return samples


def _rows(batch: Microbatch, places: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of `batch.logit_positions` for the places that are asked for, int64 on its device. A place
    below 0 counts from the end."""
    rows = [np.empty(0, dtype=np.int64)]
    for number, item in enumerate(batch.items):
        wanted = np.asarray(places[item.number], dtype=np.int64)
        length = len(item.sample.tokens)
        assert np.all((-length <= wanted) & (wanted < length)), "a mark lies in its response"
        rows.append(batch.response_cu_seqlens[number] + wanted % length)
    return torch.from_numpy(np.concatenate(rows)).to(batch.logit_positions.device)
