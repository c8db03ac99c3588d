"""Advice on load balance: how long a step would take with other options, or with other ranks a role.

All of it is what the model of the step says (step_model.py), by rates that a run measured or that
are a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1zero.algo.losses import LOSSES
from r1zero.config.rules import check_pool
from r1zero.config.schema import Config, placement, with_ranks
from r1zero.distributed.placement import Placement, RankGrid
from r1zero.preflight.step_model import Job, Lengths, Rates, Step, predict
from r1zero.preflight.step_rates import measured_job, measured_lengths, measured_rates

GAIN = 0.1  # less of the step's time is not worth a new start
NOTABLE = 0.02  # less is not worth a word
PLAYED = 12  # splits, those that balance work best first
ROLES = {"train", "rollout", "ref", "reward"}  # that the model knows

# What each option would be, by its key, and what it changes beside the time.
OPTIONS: dict[str, dict[str, Any]] = {
    "training.minibatch_order: expected_length": {"minibatch_order": "expected_length"},
    "algorithm.old_logprobs: rollout": {"old_logprobs": "rollout"},
    "training.updates: accumulate (one update)": {"updates": "accumulate"},
    "training.staleness: 1 (off-policy)": {"staleness": 1},
}
ON_POLICY = "all of these"  # but staleness, which stands below


@dataclass(frozen=True, slots=True)
class Split:
    """Another split of the ranks among the roles."""

    keys: str  # that ask for it, in words
    step: Step


@dataclass(frozen=True, slots=True)
class Outlook:
    """How long a step takes, and how long it would."""

    now: Step
    options: Mapping[str, Step]  # by what would be set
    split: Split | None  # the best, if there is a better one
    source: str  # of the rates, in words


def look_ahead(cfg: Config, placed: Placement, job: Job, rates: Rates, lengths: Lengths) -> Outlook:
    """Predict a step as it is configured, with each option that is not, and with the best split."""
    now = predict(placed, job, rates, lengths)
    options: dict[str, Step] = {}
    split = None
    if not placed.colocated:
        for told, changes in _options(cfg, job).items():
            options[told] = predict(placed, replace(job, **changes), rates, lengths)
        split = _best_split(cfg, placed, job, rates, lengths, now)
    return Outlook(now, options, split, rates.source)


def faster_split(
    cfg: Config, placed: Placement, steps: Sequence[Mapping[str, float]]
) -> str | None:
    """Name the split of as many ranks, or else the option, that would make steps faster, given the
    metrics of some. None when nothing would save a tenth."""
    if placed.colocated or not placed.roles.keys() <= ROLES:
        return None
    job = measured_job(steps, cfg)
    lengths = measured_lengths(steps, cfg)
    outlook = look_ahead(cfg, placed, job, measured_rates(steps, placed, job, lengths), lengths)
    now = outlook.now.seconds
    said = []
    if outlook.split is not None and 1 - outlook.split.step.seconds / now >= GAIN:
        saved = 1 - outlook.split.step.seconds / now
        said.append(
            f"{outlook.split.keys} on the same {placed.world_size} ranks would take about "
            f"{saved:.0%} less time"
        )
    for told, step in outlook.options.items():
        saved = 1 - step.seconds / now
        if told in OPTIONS and saved >= GAIN:
            said.append(f"{told} about {saved:.0%} less")
    return "; ".join(said) or None


def _options(cfg: Config, job: Job) -> dict[str, dict[str, Any]]:
    """What could be set, and what it changes: only what is not set, and does something."""
    found: dict[str, dict[str, Any]] = {}
    together: dict[str, Any] = {}
    for told, changes in OPTIONS.items():
        if replace(job, **changes) == job or not _matters(cfg, job, changes):
            continue
        if "staleness" in changes:
            if len(found) > 1:
                found[ON_POLICY] = together
        else:
            together = together | changes
        found[told] = changes
    return found


def _matters(cfg: Config, job: Job, changes: Mapping[str, Any]) -> bool:
    """Order and old log-probs mean something only where several updates follow each other, and only
    a ratio of tokens is well taken to the engine."""
    if "old_logprobs" in changes and LOSSES[cfg.algorithm.loss].ratio != "token":
        return False
    several = job.updates == "per_minibatch" and job.num_minibatches > 1
    return several or "staleness" in changes


def _best_split(
    cfg: Config, placed: Placement, job: Job, rates: Rates, lengths: Lengths, now: Step
) -> Split | None:
    """The fastest split of these ranks; None if it is the present one.

    Work is first taken to shrink as replicas are added, so that a step lasts as long as its busiest
    role, and what the others need for one part. The splits that look best then are played.
    """
    units = [_unit(grid) for grid in placed.grids]

    def roughly(counts: Sequence[int]) -> float:
        busy = [
            now.busy[grid.role] * grid.size / (count * unit)
            for grid, count, unit in zip(placed.grids, counts, units, strict=True)
        ]
        return max(busy) + (sum(busy) - max(busy)) / job.parts

    best: Split | None = None
    limit = (1 - NOTABLE) * now.seconds
    candidates = _splits(placed.world_size, units)
    for candidate in sorted(candidates, key=roughly)[:PLAYED]:
        ranks = {
            grid.role: count * unit
            for grid, count, unit in zip(placed.grids, candidate, units, strict=True)
        }
        changed, keys = with_ranks(cfg, ranks)
        if check_pool(changed):
            continue
        step = predict(placement(changed, placed.world_size), job, rates, lengths)
        if step.seconds < limit:
            best = Split(keys, step)
            limit = step.seconds
    return best


def _unit(grid: RankGrid) -> int:
    """The ranks that a role grows by: as many replicas as its experts are dealt to.

    A replica of TP 2 x PP 2 takes four ranks, two a stage. With EP 8 four replicas fill a group, so
    that the role grows by 16 ranks.
    """
    stage = grid.tp * grid.cp
    replicas = grid.ep // math.gcd(grid.ep, stage)
    return replicas * grid.size // grid.dp


def _splits(ranks: int, units: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to fill `ranks` with at least one unit of each role.

    Six ranks, for roles whose units take 2 and 1:

    >>> list(_splits(6, [2, 1]))
    [(1, 4), (2, 2)]
    """
    first, *others = units
    if not others:
        if ranks > 0 and ranks % first == 0:
            yield (ranks // first,)
        return
    for count in range(1, ranks // first + 1):
        for rest in _splits(ranks - count * first, others):
            yield (count, *rest)
