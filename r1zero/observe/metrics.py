"""The numbers of a step, from what the ranks recorded: the keys of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r1zero.distributed.placement import Placement
from r1zero.observe.model_summary import model_metrics
from r1zero.scores import MODEL
from r1zero.types import (
    Agreement,
    Batch,
    Outcome,
    RankRecord,
    SampleSummary,
    ScoreSummary,
    SourceSummary,
    UpdateStats,
    joined,
)

# Phases of a step whose time is that of the slowest rank: spans of step.py.
PHASES = ("rollout", "reward", "ref", "update", "publish", "samples")
# Those that only some worlds have, by the role whose ranks they are of.
PHASES_OF_ROLES = {"reward": "reward_model"}
# Before the name of a role: seconds that its ranks waited for others.
WAIT_KEY = "time/wait/"


def step_metrics(
    batch: Batch,
    samples: SampleSummary,
    updates: Sequence[UpdateStats | None],
    records: Sequence[RankRecord],
    placement: Placement,
) -> dict[str, float]:
    """All metrics of a step. Means of the loss's statistics run over all its updates; one that had
    nothing to learn from is None."""
    metrics: dict[str, float] = {"step": batch.step}
    metrics |= sample_metrics(samples)
    metrics |= _group_metrics(samples, batch)
    metrics |= _tail_metrics(samples, batch)
    metrics |= _update_metrics([update for update in updates if update is not None])
    metrics["updates/skipped"] = sum(update is None for update in updates)
    metrics |= _time_metrics(records, placement)
    rate = (samples.prompt_tokens + samples.response_tokens) / metrics["time/step"]
    written = sum(record.published_bytes for record in records)
    seconds = metrics["time/publish"]
    metrics |= {
        "tokens/prompt": samples.prompt_tokens,
        "tokens/response": samples.response_tokens,
        "throughput/tokens_per_second": rate,
        "throughput/tokens_per_second_per_rank": rate / len(records),
        "publish/bytes": written,
        "publish/gigabytes_per_second": written / 1e9 / seconds if seconds else 0.0,
        "weights_version": batch.version,  # that drew the samples
        "staleness": batch.staleness,  # updates of weights that it misses
    }
    if batch.reference_version is not None:
        metrics["reference_version"] = batch.reference_version  # of the weights that it holds
    return metrics


def sample_metrics(found: SampleSummary) -> dict[str, float]:
    """Rewards and lengths of these samples; 0 if there is none."""
    samples = max(1, found.samples)
    metrics = {"reward/mean": float(found.reward / samples)}
    for name, scores in found.scores.items():
        metrics |= _score_metrics(name, scores)
    metrics |= model_metrics(found.model)
    for source, each in found.sources.items():
        metrics |= _source_metrics(source, each)
    return metrics | {
        "reward/copied": found.copied,  # responses whose answer is a span of the question
        "reward/failed": found.failed,
        "reward/failure_rate": found.failed / samples,
        "reward/equal_groups": found.equal_groups
        / max(1, found.groups),  # groups that teach nothing
        "response_length/mean": found.response_tokens / samples,
        "response_length/max": found.longest,
        "response_truncated": found.truncated / samples,
    }


def _score_metrics(name: str, found: ScoreSummary) -> dict[str, float]:
    """The mean of a reward function, and the shares of its outcomes that tell something."""
    outcomes = found.outcomes
    scored = outcomes.total()  # a function of one data set scores no others
    metrics = {}
    if found.counted:
        metrics[f"reward/{name}"] = float(found.total / found.counted)
    if name != MODEL and not outcomes[Outcome.GRADED]:
        metrics[f"reward/{name}/right"] = outcomes[Outcome.RIGHT] / scored
    usual = {Outcome.TOO_LONG} if name == MODEL else {Outcome.TIMEOUT, Outcome.CRASH}
    for outcome in Outcome:
        if outcome in usual or (outcome.failed and outcomes[outcome]):
            metrics[f"reward/{name}/{outcome.name.lower()}"] = outcomes[outcome] / scored
    return metrics


def _group_metrics(found: SampleSummary, batch: Batch) -> dict[str, float]:
    """What was drawn and what was kept of it, in groups; of a pool also what it lacks or has too
    many."""
    kept = found.groups - found.dropped.total()
    metrics: dict[str, float] = {"groups/drawn": found.groups, "groups/kept": kept}
    if batch.most_rounds > 1:
        metrics["groups/rounds"] = batch.round
        assert batch.pool is not None, "rounds draw for a pool"
        metrics["groups/surplus"] = max(0, kept - batch.pool)
        metrics["groups/short"] = max(0, batch.pool - kept)
    return metrics | {
        "groups/all_right": found.agreements[Agreement.ALL_RIGHT],
        "groups/all_wrong": found.agreements[Agreement.ALL_WRONG],
        "groups/failed": found.agreements[Agreement.FAILED],  # a score of them failed
    }


def _source_metrics(source: str, found: SourceSummary) -> dict[str, float]:
    """The samples of a data set that has a name."""
    metrics = {
        f"data/{source}/samples": found.samples,
        f"data/{source}/reward": float(found.reward / found.samples),
        f"data/{source}/response_length": found.response_tokens / found.samples,
    }
    if found.judged:
        metrics[f"data/{source}/right"] = found.right / found.judged
    return metrics


def _tail_metrics(found: SampleSummary, batch: Batch) -> dict[str, float]:
    """Where responses stopped in a short step, and what was put off; their tokens are lost."""
    if batch.response_limit is None:
        return {}
    return {
        "tail/limit": batch.response_limit,
        "tail/put_off": found.put_off,
        "tail/lost_tokens": found.put_off_tokens,
    }


def _update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """The statistics that the loss declares, and the optimizer's; of no updates only their
    number."""
    metrics: dict[str, float] = {"updates": len(updates)}
    if not updates:
        return metrics
    # in order, each once
    measured = dict.fromkeys(key for update in updates for key in update.tallies)
    for key in measured:
        metrics[key] = joined(updates, key)
    metrics["grad_norm"] = float(np.mean([update.grad_norm for update in updates]))
    metrics["lr"] = updates[-1].lr
    return metrics


def _time_metrics(records: Sequence[RankRecord], placement: Placement) -> dict[str, float]:
    """Phases by their slowest rank, waits as the mean over a role's ranks, memory by the largest
    rank."""
    ended = max(record.ended for record in records)
    began = min(record.began for record in records)
    metrics = {"time/step": ended - began}
    phases = [
        *PHASES,
        *(PHASES_OF_ROLES[role] for role in placement.roles if role in PHASES_OF_ROLES),
    ]
    for phase in phases:
        metrics[f"time/{phase}"] = max(record.seconds.get(phase, 0.0) for record in records)
    for role, grid in placement.roles.items():
        of_role = records[grid.first : grid.first + grid.size]
        waits = [record.seconds.get("wait", 0.0) for record in of_role]
        metrics[WAIT_KEY + role] = float(np.mean(waits))
        metrics[f"memory/peak_gigabytes/{role}"] = max(record.peak_gigabytes for record in of_role)
    return metrics
