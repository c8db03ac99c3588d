"""Expert routing of the rollout engine: which experts the tokens of a pass go to, chosen or forced.

What is chosen is recorded, since the trainer replays it (routing replay, Ma et al. 2025,
arXiv 2510.11370). A token that is run once more, because its keys were given up for others, is
forced to the experts of the first time: else its new keys and its old log-probs would disagree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

# In place of an expert: the router chooses.
FREE = -1


class Routes:
    """The experts of the tokens of one pass.

    `forced`, int64 [T, MoE layers, k], holds FREE for tokens that choose themselves; None: all do.
    """

    def __init__(self, top_k: int, forced: torch.Tensor | None = None) -> None:
        self._top_k = top_k
        self._forced = forced
        self._taken: list[torch.Tensor] = []  # of the layers so far

    def choose(self, place: int, scores: torch.Tensor) -> torch.Tensor:
        """The experts of each token in the MoE layer `place`, counted from 0: scores [T, E] ->
        int64 [T, k]."""
        assert place == len(self._taken), "layers run in their order"
        ids = scores.topk(self._top_k, dim=-1).indices
        if self._forced is not None:
            forced = self._forced[:, place]
            ids = torch.where(forced == FREE, ids, forced)
        self._taken.append(ids)
        return ids

    def taken(self) -> torch.Tensor | None:
        """The experts of all tokens, uint8 [T, MoE layers, k]; None where no layer has any."""
        if not self._taken:
            return None
        return torch.stack(self._taken, dim=1).to(torch.uint8)


def forced_routes(
    parts: Sequence[np.ndarray | None], lengths: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Lay the recorded routes of several sequences one behind the other, as `Routes` takes them.

    `parts` are uint8 [T, MoE layers, k], or None for a sequence of `lengths` tokens that are free.
    Of two sequences, one free of 2 tokens and a recorded one of 1, with one layer and k = 2:

    >>> recorded = np.array([[[3, 5]]], np.uint8)
    >>> forced_routes([None, recorded], [2, 1], torch.device("cpu")).tolist()
    [[[-1, -1]], [[-1, -1]], [[3, 5]]]
    """
    shapes = [part.shape[1:] for part in parts if part is not None]
    if not shapes:
        return None
    rows = []
    for part, length in zip(parts, lengths, strict=True):
        if part is None:
            rows.append(np.full((length, *shapes[0]), FREE, np.int64))
            continue
        assert len(part) == length, "a route for each token"
        rows.append(part.astype(np.int64))
    return torch.from_numpy(np.concatenate(rows)).to(device)


def ranks_agree(routes: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether all ranks of the group have the same routes; each of them gets the same answer."""
    least = routes.to(torch.int32)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return bool(torch.equal(least, most))
