"""The reference policy, frozen: computes the reference log-probs of finished groups."""

from __future__ import annotations

from r1zero.algo.packing import TrainSample, cut_microbatches
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs
from r1zero.types import Group


class Reference:
    """The model of the ref ranks."""

    def __init__(
        self, model: RoleModel, temperature: float, max_samples: int, max_tokens: int | None
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.max_samples = max_samples
        self.max_tokens = max_tokens
        self._tokens = 0
        model.module.eval()

    def add_logprobs(self, groups: list[Group]) -> list[Group]:
        """Fill `ref_logprobs` of every sample that trains. Stages before the last leave the groups
        as they are."""
        items: list[TrainSample] = []
        for group in groups:
            for sample in group.training:
                items.append(TrainSample(len(items), group.position, group.prompt, sample))
        if not items:
            return groups
        microbatches = cut_microbatches(items, self.max_samples, self.max_tokens)
        found = compute_logprobs(self.model, self.model.module, microbatches, self.temperature)
        if self.model.grid.is_last_stage:
            for item in items:
                item.sample.ref_logprobs = found[item.number]
                self._tokens += len(found[item.number])
        return groups

    def take_tokens(self) -> int:
        """Response tokens looked back at since the last call, on the last stage."""
        tokens = self._tokens
        self._tokens = 0
        return tokens
