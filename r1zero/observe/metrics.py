"""The numbers of a step, from what the ranks recorded: the keys of metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from r1zero.distributed.placement import Placement
from r1zero.types import Batch, Group, Outcome, RankRecord, Sample, UpdateStats, joined

# Phases of a step whose time is that of the slowest rank: spans of step.py.
PHASES = ("rollout", "reward", "ref", "update", "publish")
# Before the name of a role: seconds that its ranks waited for others.
WAIT_KEY = "time/wait/"


def step_metrics(
    batch: Batch,
    groups: Sequence[Group],
    updates: Sequence[UpdateStats | None],
    records: Sequence[RankRecord],
    placement: Placement,
) -> dict[str, float]:
    """All metrics of a step. Means of the loss's statistics run over all its updates; one that had
    nothing to learn from is None."""
    metrics: dict[str, float] = {"step": batch.step}
    metrics |= sample_metrics(groups)
    metrics |= _update_metrics([update for update in updates if update is not None])
    metrics |= _time_metrics(records, placement)
    prompt_tokens = sum(len(group.prompt.tokens) * len(group.samples) for group in groups)
    response_tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    rate = (prompt_tokens + response_tokens) / metrics["time/step"]
    written = sum(record.published_bytes for record in records)
    seconds = metrics["time/publish"]
    metrics |= {
        "tokens/prompt": prompt_tokens,
        "tokens/response": response_tokens,
        "throughput/tokens_per_second": rate,
        "throughput/tokens_per_second_per_rank": rate / len(records),
        "publish/bytes": written,
        "publish/gigabytes_per_second": written / 1e9 / seconds if seconds else 0.0,
        "weights_version": batch.version,
    }
    return metrics


def sample_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of the samples of these groups."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = np.array([len(sample.tokens) for sample in samples])
    rewards = [group.rewards for group in groups]
    flat = [found for found in rewards if len(set(found)) == 1]
    metrics = {"reward/mean": float(np.mean(np.concatenate(rewards)))}
    for name in samples[0].scores:
        metrics[f"reward/{name}"] = float(
            np.mean([sample.scores[name].value for sample in samples])
        )
        outcomes = Counter(sample.scores[name].outcome for sample in samples)
        if not outcomes[Outcome.GRADED]:
            metrics[f"reward/{name}/right"] = outcomes[Outcome.RIGHT] / len(samples)
        metrics[f"reward/{name}/timeout"] = outcomes[Outcome.TIMEOUT] / len(samples)
        metrics[f"reward/{name}/crash"] = outcomes[Outcome.CRASH] / len(samples)
    failed = sum(sample.failed for sample in samples)
    copied = sum(_is_copied(sample) for sample in samples)
    return metrics | {
        "reward/copied": copied,  # responses whose answer is a span of the question
        "reward/failed": failed,
        "reward/failure_rate": failed / len(samples),
        "reward/equal_groups": len(flat) / len(groups),  # groups that teach nothing
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_truncated": float(np.mean([sample.truncated for sample in samples])),
    }


def _is_copied(sample: Sample) -> bool:
    return any(score.outcome is Outcome.COPIED for score in sample.scores.values())


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

    def seconds(rank: int, name: str) -> float:
        return sum(span.seconds for span in records[rank].spans if span.name == name)

    spans = [span for record in records for span in record.spans]
    metrics = {"time/step": max(span.end for span in spans) - min(span.start for span in spans)}
    for phase in PHASES:
        metrics[f"time/{phase}"] = max(seconds(rank, phase) for rank in range(len(records)))
    for role, grid in placement.roles.items():
        waits = [seconds(rank, "wait") for rank in grid.ranks]
        peaks = [records[rank].peak_gigabytes for rank in grid.ranks]
        metrics[WAIT_KEY + role] = float(np.mean(waits))
        metrics[f"memory/peak_gigabytes/{role}"] = max(peaks)
    return metrics
