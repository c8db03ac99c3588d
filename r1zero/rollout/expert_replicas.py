"""Wide expert parallelism: replicas of the rollout engine that share the experts of their layers.

A rank holds whole experts, but those of a layer lie on all ranks of several replicas, so that a model of
many experts fits (DeepSeek-V3 technical report, 2024, section 3.4). Two replicas of TP 2, 8 experts:

    replica             0     0     1     1
    TP rank             0     1     0     1
    experts             0 1   2 3   4 5   6 7
    exchange with       2     3     0     1       the ranks of one TP index, one of each replica

In a layer with experts, the ranks of an exchange gather the tokens of all their replicas with the
experts that these chose. Each multiplies what goes to its own experts, and gets back the sum for its
own tokens (reduce-scatter). The sum over the TP ranks, which ends every MLP, adds up the rest.

So no replica runs a pass alone: before each pass all agree on how many tokens each has, prompts or
newest tokens of samples alike, and one that has none serves with its experts. Three replicas, of which
the last is through with what it was asked for:

    replica 0    prompts: 37 tokens    decodes 8    decodes 8    ...
    replica 1    decodes 16            decodes 15   decodes 15   ...
    replica 2    serves                serves       serves       ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1zero.distributed import collectives
from r1zero.models.family import DecoderOperators, LocalExperts
from r1zero.models.sizes import EXCHANGED_TOKENS

if TYPE_CHECKING:
    from r1zero.distributed.groups import Grid


class _State(IntEnum):
    """Why a replica joins a pass."""

    SERVES = 0  # it has nothing to run
    AHEAD = 1  # it runs samples of a later part, as long as others wait
    WAITS = 2  # it runs what it was asked for


@dataclass(frozen=True, slots=True)
class _Slice:
    """Tokens of all replicas that are exchanged together: `width` of each, some of which may be filler."""

    first: int  # of each replica's tokens
    width: int
    # int64, the places of true tokens among all that are gathered; None: all are
    true: torch.Tensor | None


class ExpertReplicas:
    """The replicas with which this rank's shares experts. All of them call alike, pass by pass."""

    def __init__(self, grid: Grid) -> None:
        self.parts = grid.span.ep
        self.index = grid.expert_index
        self.waits = False  # whether this replica waits for what it runs
        self.anyone_waits = False  # whether any did in the last pass, this one among them
        self._tokens = grid.groups["ep_dp"]
        self._control = grid.groups["ep_dp_control"]
        self._number = dist.get_rank(self._tokens)
        self._count = dist.get_world_size(self._tokens)
        self._slices: list[_Slice] = []

    def begin(self, tokens: int, device: torch.device) -> bool:
        """Agree on the next pass, to which this replica brings so many tokens. False if no replica
        brings any: then there is none."""
        state = _State.SERVES
        if tokens:
            state = _State.WAITS if self.waits else _State.AHEAD
        said = torch.zeros(self._count, 2, dtype=torch.int64)
        said[self._number] = torch.tensor([tokens, state])
        counts, states = collectives.all_sum(said, self._control).T.tolist()
        self.anyone_waits = _State.WAITS in states
        self._slices = list(_slices(counts, device))
        return any(counts)

    def multiply(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
        operators: DecoderOperators,
    ) -> torch.Tensor:
        """What the experts of the ranks of this exchange add to this replica's tokens: as
        DecoderOperators.experts, [T, H] -> [T, H]."""
        top_k = ids.shape[1]
        choice = torch.cat([ids.float(), weights], dim=1)  # numbers of experts are exact in fp32
        found = []
        for piece in self._slices:
            everyone = self._gather(x, piece)
            choices = self._gather(choice, piece)
            if piece.true is not None:
                everyone = everyone[piece.true]
                choices = choices[piece.true]
            added = operators.experts(
                everyone, choices[:, :top_k].long(), choices[:, top_k:].contiguous(), experts
            )
            own = self._scatter(added, piece)
            found.append(own[: max(0, len(x) - piece.first)])
        return torch.cat(found)

    def _gather(self, rows: torch.Tensor, piece: _Slice) -> torch.Tensor:
        """Lay a slice of all replicas end to end, each filled up to its width."""
        own = rows[piece.first : piece.first + piece.width]
        own = F.pad(own, (0, 0, 0, piece.width - len(own)))
        gathered = own.new_empty(self._count * piece.width, own.shape[1])
        dist.all_gather_into_tensor(gathered, own, group=self._tokens)
        return gathered

    def _scatter(self, added: torch.Tensor, piece: _Slice) -> torch.Tensor:
        """Add up what all ranks found for the true tokens of a slice; this replica's, with filler."""
        whole = added
        if piece.true is not None:
            whole = added.new_zeros(self._count * piece.width, added.shape[1])
            whole[piece.true] = added
        own = whole.new_empty(piece.width, whole.shape[1])
        dist.reduce_scatter_tensor(own, whole.contiguous(), group=self._tokens)
        return own


class SharedExperts:
    """`DecoderOperators` of a rank whose replica shares experts with others."""

    def __init__(self, operators: DecoderOperators, replicas: ExpertReplicas) -> None:
        self.add_norm = operators.add_norm
        self.silu_mul = operators.silu_mul
        self._operators = operators
        self._replicas = replicas

    def experts(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: LocalExperts,
    ) -> torch.Tensor:
        """As DecoderOperators.experts, by the experts of all replicas."""
        return self._replicas.multiply(x, ids, weights, experts, self._operators)


def _slices(counts: Sequence[int], device: torch.device) -> list[_Slice]:
    """Cut a pass to which replicas bring so many tokens.

    Of 3 and 1 tokens, gathered as a a a b - -, those at 0 1 2 3 are true:

    >>> [only] = _slices([3, 1], torch.device("cpu"))
    >>> only.width, only.true.tolist()
    (3, [0, 1, 2, 3])
    """
    most = max(counts)
    step = max(1, EXCHANGED_TOKENS // len(counts))
    found = []
    for first in range(0, most, step):
        width = min(step, most - first)
        here = [min(max(count - first, 0), width) for count in counts]
        true = None
        if min(here) < width:
            places = [torch.arange(n) + replica * width for replica, n in enumerate(here)]
            true = torch.cat(places).to(device)
        found.append(_Slice(first, width, true))
    return found
