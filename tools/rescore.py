"""Scores the saved samples of a run again and prints what changed: the effect of other scorers or
settings.

    python tools/rescore.py runs/tiny/samples/*.parquet [--verifier acc format] [--config CONFIG]

Scorers, their settings, the response budget and the tokenizer are those of CONFIG, by default the
run's own config.yaml; --verifier names other scorers. The responses are those that training saw:
without special tokens.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import user_path
from r1zero.config.schema import Config
from r1zero.data.prompts import load_tokenizer, vocabulary_of
from r1zero.errors import BadInput
from r1zero.preflight.resolve import load_config
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.math.gold import read_gold
from r1zero.reward.rules import check_names
from r1zero.reward.types import RewardInput
from r1zero.types import Score

BAD_INPUT = 2
TAIL = 100  # characters of a response that an example shows
COLUMNS = (
    "position",
    "member",
    "prompt",
    "response",
    "ground_truth",
    "response_length",
    "truncated",
    "reward",
)


@dataclass
class Changes:
    """What one scorer, or the reward, says otherwise than before."""

    outcomes: Counter[str] = field(default_factory=Counter)  # "right -> wrong"
    examples: list[str] = field(default_factory=list)


def main() -> int:
    """Score samples again; returns the exit code."""
    parser = CommandLine(description="Score saved samples again and print what changed.")
    parser.add_argument(
        "files", nargs="+", type=user_path, metavar="FILE", help="samples/step_*.parquet"
    )
    parser.add_argument("--verifier", nargs="+", metavar="SCORER", help="default: those of CONFIG")
    parser.add_argument(
        "--config", help="default: config.yaml of the run that the first file belongs to"
    )
    parser.add_argument("--examples", type=int, default=5, help="to print for each scorer")
    args = parser.parse_args()
    try:
        cfg, _ = load_config(
            args.config or str(args.files[0].resolve().parent.parent / "config.yaml")
        )
        names = args.verifier or cfg.algorithm.verifier_function
        for problem in check_names(names):
            raise BadInput(f"--verifier: {problem}")
        special = vocabulary_of(load_tokenizer(cfg.training.tokenizer_name_or_path)).special
        groups = [group for path in args.files for group in read_groups(path)]
        rescore(
            cfg, names, groups, re.compile("|".join(map(re.escape, special)) or "$^"), args.examples
        )
    except (BadInput, RuntimeError) as error:
        print(f"rescore.py: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def read_groups(path: Path) -> Iterator[list[dict]]:
    """Yield the rows of a file by prompt, each with its place. BadInput when it is no file of
    samples."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path} cannot be read as parquet: {error}") from None
    missing = [column for column in COLUMNS if rows and column not in rows[0]]
    if missing:
        raise BadInput(f"{path} has no column {missing[0]}: give samples/step_*.parquet of a run")
    rows.sort(key=lambda row: (row["position"], row["member"]))
    for _, group in groupby(rows, key=lambda row: row["position"]):
        yield [
            row | {"place": f"{path.name}, prompt {row['position']}, member {row['member']}"}
            for row in group
        ]


def rescore(
    cfg: Config, names: list[str], groups: list[list[dict]], special: re.Pattern[str], shown: int
) -> None:
    """Score the groups and print what changed; the reward, too, when the scorers are those of the
    run."""
    whole = names == cfg.algorithm.verifier_function
    if whole:
        weights = cfg.algorithm.verifier_weight
    else:
        weights = [1.0] * len(names)
    cases = (
        [
            RewardInput(
                row["prompt"],
                special.sub("", row["response"]),
                read_gold(row["ground_truth"]),
                row["response_length"],
                cfg.response_budget,
                row["truncated"],
            )
            for row in group
        ]
        for group in groups
    )
    with RewardExecutor(names, weights, cfg.reward) as executor:
        changes = {name: Changes() for name in [*executor.scorers, *(["reward"] if whole else [])]}
        stream = tqdm(executor.stream(cases), total=len(groups), disable=None)
        for group, members in zip(groups, stream, strict=True):
            for row, scores in zip(group, members, strict=True):
                for name, score in scores.items():
                    _note(changes[name], row, _change(row, name, score), shown)
                if whole and abs(executor.reward(scores) - row["reward"]) > 1e-9:
                    _note(
                        changes["reward"],
                        row,
                        f"{row['reward']:g} -> {executor.reward(scores):g}",
                        shown,
                    )
    print(f"{sum(map(len, groups))} samples scored again by {', '.join(names)}")
    for name, change in changes.items():
        print(f"\n{name}: {change.outcomes.total() or 'no'} changes")
        for what, count in change.outcomes.most_common(20):
            print(f"  {count:7d}  {what}")
        for example in change.examples:
            print(f"  {example}")


def _change(row: dict, name: str, score: Score) -> str:
    """Return how a score differs from the saved one; "" when it does not."""
    outcome = score.outcome.name.lower()
    value = row.get(f"score/{name}")
    if value is None:
        return f"not scored -> {outcome}"
    if outcome != row[f"outcome/{name}"]:
        return f"{row[f'outcome/{name}']} -> {outcome}"
    if abs(score.value - value) <= 1e-9:
        return ""
    return f"{outcome} {value:g} -> {score.value:g}"


def _note(changes: Changes, row: dict, what: str, shown: int) -> None:
    if not what:
        return
    changes.outcomes[what] += 1
    if len(changes.examples) < shown and not what.startswith("not scored"):
        changes.examples.append(
            f"{row['place']}: {what}; right answer {row['ground_truth']!r:.60}, response ends "
            f"{row['response'][-TAIL:]!r}"
        )


if __name__ == "__main__":
    sys.exit(main())
