"""Routing replay: routers choose the experts that the rollout engine chose (arXiv:2510.11370, R3).

Two experts may be almost equally good for a token, and rounding decides. Where trainer and engine
decide differently, their log-probs differ by far more than rounding. So the engine records the
choice, and the trainer repeats it. What the chosen experts weigh comes from the trainer's router as
it is, so the router learns as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

# What Megatron's router asks: scores [T, experts], k, groups of experts and how many of them to take,
# to the best k scores of each token and their experts, both [T, k].
TopK = Callable[[torch.Tensor, int, int | None, int | None], tuple[torch.Tensor, torch.Tensor]]


class ReplayedBatch(Protocol):
    """What a replay needs to know of a batch."""

    @property
    def routes(self) -> torch.Tensor | None:
        """Expert ids, uint8 [T, layers with experts, k]. None: routers choose themselves."""

    @property
    def predictions(self) -> torch.Tensor | None:
        """How many response tokens are predicted from each token, int64 [T]."""


class RouterAgreement:
    """Counts how often the routers of a model would have chosen what they replay: the same set of
    experts for a token in a layer.

    A token counts as often as a response token is predicted from it: the last one of a prompt once
    for each response, its others never. So the count does not depend on how batches are cut.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.int64, device=device)
        self._with_gradients: bool | None = None  # None: does not count

    @contextlib.contextmanager
    def counting(self, with_gradients: bool) -> Iterator[None]:
        """Count the passes inside that do, or do not, make gradients.

        A layer whose activations are recomputed runs without them first, and counts once.
        """
        self._with_gradients = with_gradients
        try:
            yield
        finally:
            self._with_gradients = None

    @property
    def counts(self) -> bool:
        """This pass counts."""
        return self._with_gradients == torch.is_grad_enabled()

    def add(self, own: torch.Tensor, replayed: torch.Tensor, predictions: torch.Tensor) -> None:
        """Compare two choices [T, k] of one layer."""
        same = (own[:, :, None] == replayed[:, None, :]).any(-1).all(-1)
        self._sums += torch.stack([(same * predictions).sum(), predictions.sum()])

    def take(self) -> torch.Tensor:
        """How many were the same, and how many there were, since the last call: int64 [2]."""
        sums = self._sums.clone()
        self._sums.zero_()
        return sums


class RouterReplay:
    """The replay of one layer. It stands where Megatron's TopKRouter keeps its `router_replay`, and
    is asked in its place which experts are the best.

    The attention of the layer, which has the batch in every pass, hands it over just before. So
    layers that are recomputed, and microbatches that overtake each other in a pipeline, need no
    queue. Megatron's own replay lists all routers of the process, those of a reference among them.
    """

    def __init__(self, layer: int, agreement: RouterAgreement) -> None:
        """`layer` counts those with experts, of the whole model."""
        self._layer = layer
        self._agreement = agreement
        self._ids: torch.Tensor | None = None
        self._predictions: torch.Tensor | None = None

    def take(self, batch: ReplayedBatch) -> None:
        """Replay the routes of this batch from now on."""
        self._ids = None
        self._predictions = batch.predictions
        if batch.routes is not None:
            self._ids = batch.routes[:, self._layer].long()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores [T, k] of the experts that are to be chosen, with gradient, and these."""
        if self._ids is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        assert self._ids.shape == (len(scores), topk), "routes are those of these tokens"
        if self._agreement.counts and self._predictions is not None:
            _, own = default_compute_topk(scores.detach(), topk, num_groups, group_topk)
            self._agreement.add(own, self._ids, self._predictions)
        return scores.gather(1, self._ids), self._ids
