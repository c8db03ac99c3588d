"""Advice on load balance: which other split of the ranks among the roles would be faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import mul

from r1zero.config.rules import check_pool
from r1zero.config.schema import Config, placement, with_ranks
from r1zero.distributed.placement import Placement
from r1zero.preflight.checks import check_batches

GAIN = 0.1  # less of the step's time is not worth a new start
LOOKED_AT = 50  # candidates, fastest first: most fit the batch sizes


def faster_split(cfg: Config, placed: Placement, working: Mapping[str, float]) -> str | None:
    """Name the keys of a split of as many ranks that would be faster, given seconds of work a step
    by role.

    Work is taken to shrink as ranks are added. With M minibatches a step lasts as long as its
    busiest role, plus what the others need for one minibatch before and after: max + (sum - max) /
    M. None when there is no such split.
    """
    if placed.colocated:
        return None
    minibatches = cfg.num_samples // cfg.actor_rollout.ppo_mini_batch_size

    def seconds(replicas: Sequence[int]) -> float:
        busy = [
            working[role] * span.dp / count
            for (role, span), count in zip(placed.roles.items(), replicas, strict=True)
        ]
        return max(busy) + (sum(busy) - max(busy)) / minibatches

    now = seconds([span.dp for span in placed.grids])
    ranks_of_replica = [span.size // span.dp for span in placed.grids]
    candidates = _splits(placed.world_size, ranks_of_replica)
    for candidate in sorted(candidates, key=seconds)[:LOOKED_AT]:
        saved = 1 - seconds(candidate) / now
        if saved < GAIN:
            return None
        ranks = map(mul, candidate, ranks_of_replica)
        changed, keys = with_ranks(cfg, dict(zip(placed.roles, ranks, strict=True)))
        if not check_pool(changed) and not check_batches(
            changed, placement(changed, placed.world_size)
        ):
            return (
                f"{keys} on the same {placed.world_size} ranks would take about {saved:.0%} less "
                "time"
            )
    return None


def _splits(ranks: int, ranks_of_replica: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to fill `ranks` with at least one replica of each role.

    Six ranks, for roles whose replicas take 2 and 1:

    >>> list(_splits(6, [2, 1]))
    [(1, 4), (2, 2)]
    """
    first, *others = ranks_of_replica
    if not others:
        if ranks > 0 and ranks % first == 0:
            yield (ranks // first,)
        return
    for replicas in range(1, ranks // first + 1):
        for rest in _splits(ranks - replicas * first, others):
            yield (replicas, *rest)
