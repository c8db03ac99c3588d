"""The reference policy: computes the reference log-probs of finished groups.

It never learns. It stays as it was loaded, or takes the policy's weights every so many steps
(`ref.reset_interval`), as DeepSeek-R1-Zero's does (arXiv:2501.12948).
"""

from __future__ import annotations

import torch.distributed as dist

from r1zero.algo.packing import TrainSample, cut_microbatches
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.params import EMBEDDING, OUTPUT_LAYER
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, in_lockstep
from r1zero.types import Group

LAYOUT = WeightLayout(names="megatron", cut=True)


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
        own = cut_microbatches(items, self.max_samples, self.max_tokens)
        microbatches = in_lockstep(self.model, own)
        if not microbatches:
            return groups
        found = compute_logprobs(self.model, self.model.module, microbatches, self.temperature)
        if self.model.grid.is_last_stage:
            for item in items:
                item.sample.ref_logprobs = found[item.number]
                self._tokens += len(found[item.number])
        return groups

    def weights(self) -> WeightTarget:
        """Where the policy's weights go at a reset."""
        return WeightTarget(LAYOUT, self.model.parameters(), self._complete)

    def _complete(self, version: int) -> None:
        """All weights of this version have come. With tied weights the last stage has a copy of the
        embedding, which is not published: it comes from the first stage."""
        grid = self.model.grid
        if not self.model.shape.tie_word_embeddings or grid.span.pp == 1:
            return
        if not grid.is_first_stage and not grid.is_last_stage:
            return
        name = EMBEDDING if grid.is_first_stage else OUTPUT_LAYER
        first = grid.span.rank_at(tp=grid.tp_index, cp=grid.cp_index, dp=grid.replica)
        embedding = self.model.parameters()[name].detach()
        dist.broadcast(embedding, src=first, group=grid.groups["embd"])

    def take_tokens(self) -> int:
        """Response tokens looked back at since the last call, on the last stage."""
        tokens = self._tokens
        self._tokens = 0
        return tokens
