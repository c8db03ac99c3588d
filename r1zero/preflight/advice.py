"""Advice on load balance: which other split of the ranks among the roles would be faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from r1zero.config.rules import check_pool
from r1zero.config.schema import Config, placement
from r1zero.distributed.placement import Placement, RankGrid
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

    def seconds(replicas: tuple[int, int, int]) -> float:
        busy = [
            working[span.role] * span.dp / count
            for span, count in zip(placed.grids, replicas, strict=True)
        ]
        return max(busy) + (sum(busy) - max(busy)) / minibatches

    now = seconds(tuple(span.dp for span in placed.grids))
    for candidate in sorted(_candidates(placed.grids), key=seconds)[:LOOKED_AT]:
        saved = 1 - seconds(candidate) / now
        if saved < GAIN:
            return None
        train, rollout, ref = (
            count * span.tp * span.pp for span, count in zip(placed.grids, candidate, strict=True)
        )
        changed = replace(
            cfg,
            actor_rollout=replace(
                cfg.actor_rollout, num_gpus_for_train=train, num_gpus_for_infer=rollout
            ),
            resource_pool=replace(
                cfg.resource_pool, actor_rollout=[train + rollout], ref=[ref], ranks_per_node=None
            ),
        )
        if not check_pool(changed) and not check_batches(
            changed, placement(changed, placed.world_size)
        ):
            return (
                f"num_gpus_for_train {train}, num_gpus_for_infer {rollout} and resource_pool.ref "
                f"[{ref}] on the same {placed.world_size} ranks would take about {saved:.0%} less "
                "time"
            )
    return None


def _candidates(spans: tuple[RankGrid, RankGrid, RankGrid]) -> list[tuple[int, int, int]]:
    """All (train, rollout, ref) replicas that fill the same ranks."""
    size = sum(span.size for span in spans)
    train, rollout, ref = (span.tp * span.pp for span in spans)
    found = []
    for trainers in range(1, size // train + 1):
        for referees in range(1, (size - trainers * train) // ref + 1):
            left = size - trainers * train - referees * ref
            if left and left % rollout == 0:
                found.append((trainers, left // rollout, referees))
    return found
