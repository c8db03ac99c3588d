"""Lockstep: all replicas run the same number of microbatches.

Expert parallelism lays the experts of a layer across replicas, so the tokens of every microbatch
travel between replicas in every layer, and one that has fewer microbatches would leave the others
waiting for it. What a replica lacks it runs empty: see packing.pack. In training,
models without experts do the same, so that there is one way, and lose nothing by it: their replicas
wait for the last one anyway, at the end of an update. Replicas of the reference never meet, unless
experts lie across them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from r1zero.algo.packing import S, Sized, cut_microbatches


def most_microbatches(
    shares: Iterable[Sequence[Sized]], max_samples: int, max_tokens: int | None
) -> int:
    """The microbatches of the replica that has most; `max_samples` and `max_tokens` bound one."""
    return max(len(cut_microbatches(share, max_samples, max_tokens)) for share in shares)


def fill_up(microbatches: list[list[S]], count: int) -> list[list[S]]:
    """These microbatches and empty ones, `count` in all."""
    empty: list[list[S]] = [[] for _ in range(count - len(microbatches))]
    return microbatches + empty
