"""Aggregation (loss reduction) of token losses to this microbatch's part of the minibatch loss.

Each is a pure function (loss of each token [R], LossBatch) -> scalar, whose denominator is that of
the whole minibatch over all ranks: the parts add up, so microbatches and replicas change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from r1zero.config.registry import Table

if TYPE_CHECKING:
    import torch

    from r1zero.algo.loss_batch import LossBatch

Aggregation: TypeAlias = "Callable[[torch.Tensor, LossBatch], torch.Tensor]"

AGGREGATIONS: Table[Aggregation] = Table("algorithm.aggregation")
DEFAULT = "token_mean"
# What an aggregation divides a sum by; of one's own functions that is not known.
DENOMINATORS: Mapping[str, Literal["tokens", "sequences"]] = {
    "token_mean": "tokens",
    "sequence_mean": "sequences",
}


@AGGREGATIONS.add
def token_mean(losses: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """All tokens weigh the same, so long responses more (DAPO, arXiv:2503.14476, section 3.3)."""
    return (losses * batch.mask).sum() / batch.num_tokens


@AGGREGATIONS.add
def sequence_mean(losses: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """All responses weigh the same: means over tokens first (GRPO, arXiv:2402.03300, eq. 3)."""
    return batch.sequence_mean(losses).sum() / batch.num_sequences
