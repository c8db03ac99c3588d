"""A reward function whose verdicts stand in the data, and data for it: what a filter sees is then known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from r1zero.reward.functions import reward_function
from r1zero.reward.types import RewardInput
from r1zero.types import Outcome, Score

FUNCTION = f"{Path(__file__).resolve()}:scripted"
GROUP = 4  # responses of a prompt

_scored: Counter[str] = Counter()  # responses, by prompt, in the one process that scores a replica


@reward_function(scope="sample", columns=("rights",), gives_verdict=True)
def scripted(case: RewardInput) -> Score:
    """The first so many responses of a group that end are right; -1: the function fails."""
    rights = case.row["rights"]
    if rights < 0:
        raise ValueError("it was to fail")
    before = _scored[case.prompt] % GROUP
    _scored[case.prompt] += 1
    if before < rights:
        return Score(1.0, Outcome.RIGHT)
    return Score(0.0, Outcome.WRONG)


def write_data(path: Path, tiny: Path, rights: Sequence[int]) -> list[str]:
    """Write problems of the tiny model with these numbers of right answers, in order; returns the
    overrides of a run that takes them in this order."""
    table = pq.read_table(tiny / "train.parquet").slice(0, len(rights))
    pq.write_table(table.append_column("rights", [list(rights)]), path)
    return [
        f"actor_rollout.data_path={path}",
        "training.no_shuffle=true",
        f"algorithm.verifier_function=['{FUNCTION}']",
        "algorithm.verifier_weight=[1.0]",
        "reward.workers=1",
    ]
