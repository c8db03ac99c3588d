"""logs/spans.jsonl: what a few ranks of every role did when, a line a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1zero.distributed.placement import Placement
from r1zero.report.history import SPAN_RANKS
from r1zero.types import RankRecord


def span_ranks(placement: Placement) -> list[int]:
    """The ranks whose spans are kept: all of a small world, else the first ones of each role."""
    return placement.first_ranks(SPAN_RANKS)


def spans_entry(step: int, placement: Placement, records: Sequence[RankRecord]) -> dict[str, Any]:
    """The line of a step: these ranks, the roles of each, and [rank, name, start, end] in seconds
    since the epoch."""
    ranks = span_ranks(placement)
    spans = []
    for rank in ranks:
        for span in records[rank].spans:
            spans.append([rank, span.name, span.start, span.end])
    roles = [placement.roles_of(rank) for rank in ranks]
    return {"step": step, "ranks": ranks, "roles": roles, "spans": spans}
