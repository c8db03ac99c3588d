"""The reward model in the report: how it scores right and wrong answers, and short and long ones, over
all samples of a step."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from r1zero.scores import MODEL, Outcome

SCORE = f"score/{MODEL}"
OUTCOME = "outcome/"
DECIDING = ("acc", "base_acc")  # rules that say which answers are right, or else the first verdict
VERDICTS = {
    outcome.name.lower()
    for outcome in Outcome
    if outcome is not Outcome.GRADED and not outcome.failed
}
RIGHT_KEY = f"reward/{MODEL}/of_right"
WRONG_KEY = f"reward/{MODEL}/of_wrong"
LENGTH_KEY = f"reward/{MODEL}/of_quarter_"  # and its number, from 1, the shortest responses
QUARTERS = 4


def columns_of_model(names: list[str]) -> list[str]:
    """Those of the columns that model_scores reads."""
    if SCORE not in names:
        return []
    return [SCORE, *(name for name in names if name.startswith(OUTCOME))]


def model_scores(table: pa.Table) -> dict[str, float]:
    """The mean scores of these parts of a step's samples; nothing of a run without the model."""
    if SCORE not in table.column_names:
        return {}
    values = table[SCORE].to_numpy().astype(float)  # null becomes not a number
    is_read = np.isfinite(values)
    found: dict[str, float] = {}
    rule = _deciding_rule(table)
    if rule is not None:
        outcomes = np.array(table[OUTCOME + rule].to_pylist(), dtype=object)
        is_right = outcomes == "right"
        is_wrong = np.isin(outcomes, list(VERDICTS - {"right"}))
        found |= _mean(RIGHT_KEY, values[is_read & is_right])
        found |= _mean(WRONG_KEY, values[is_read & is_wrong])
    lengths = table["response_length"].to_numpy()[is_read]
    by_length = values[is_read][np.argsort(lengths, kind="stable")]
    for number, quarter in enumerate(np.array_split(by_length, QUARTERS), start=1):
        found |= _mean(f"{LENGTH_KEY}{number}", quarter)
    return found


def _deciding_rule(table: pa.Table) -> str | None:
    """The rule that says which answers are right; None when no rule has a verdict."""
    names = [name for name in table.column_names if name.startswith(OUTCOME)]
    rules = [name.removeprefix(OUTCOME) for name in names]
    for rule in [*DECIDING, *rules]:
        if rule in rules and VERDICTS & set(table[OUTCOME + rule].unique().to_pylist()):
            return rule
    return None


def _mean(key: str, values: np.ndarray) -> dict[str, float]:
    """The mean by its key; nothing of no values."""
    if not len(values):
        return {}
    return {key: float(values.mean())}
