"""Scores the saved samples of a run again and prints what changed: the effect of other reward
functions or settings.

    python tools/rescore.py runs/tiny/samples/*.parquet [--verifier acc format] [--config CONFIG]

Reward functions, their settings, the response budget and the tokenizer are those of CONFIG, by
default the run's own config.yaml; --verifier names other functions. The responses are those that
training saw: without special tokens. The columns of the data that reward functions see are read
from the data of CONFIG. A reward model is not asked again, so the reward of a run that has one is
not compared.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import user_path
from r1zero.config.schema import Config, filled
from r1zero.data.preprocessed import is_preprocessed
from r1zero.data.problems import read_problems
from r1zero.data.prompts import load_tokenizer, vocabulary_of
from r1zero.data.row_reader import Problem
from r1zero.data.sources import Keep, train_sources
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.preflight.datasets import keeping
from r1zero.preflight.resolve import load_config
from r1zero.reward.choose import choose, columns_of
from r1zero.reward.config import RewardConfig, reward_config
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.math.gold import read_gold
from r1zero.reward.types import RewardInput
from r1zero.scores import MODEL, Score

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
    """What one reward function, or the reward, says otherwise than before."""

    outcomes: Counter[str] = field(default_factory=Counter)  # "right -> wrong"
    examples: list[str] = field(default_factory=list)


def main() -> int:
    """Score samples again; returns the exit code."""
    parser = CommandLine(description="Score saved samples again and print what changed.")
    parser.add_argument(
        "files",
        nargs="+",
        type=user_path,
        metavar="FILE",
        help="samples/step_*.parquet, files or folders of them",
    )
    parser.add_argument(
        "--verifier", nargs="+", metavar="FUNCTION", help="default: those of CONFIG"
    )
    parser.add_argument(
        "--config", help="default: config.yaml of the run that the first file belongs to"
    )
    parser.add_argument("--examples", type=int, default=5, help="to print for each function")
    args = parser.parse_args()
    try:
        cfg, _ = load_config(
            args.config or str(args.files[0].resolve().parent.parent / "config.yaml")
        )
        of_sources = {source.label: source.scorers for source in train_sources(cfg)}
        config = reward_config(cfg.algorithm, cfg.reward, of_sources)
        if args.verifier:
            weights = [1.0] * len(args.verifier)
            config = replace(config, names=args.verifier, weights=weights, of_sources={})
        kept = columns_of(choose(config.functions, config.settings).values())
        special = vocabulary_of(load_tokenizer(filled(cfg.training.tokenizer_name_or_path))).special
        groups = [group for path in args.files for group in read_groups(path)]
        if kept:
            keep = (lambda _: kept) if args.verifier else keeping(cfg)
            add_rows(cfg, keep, groups)
        rescore(
            cfg,
            config,
            groups,
            re.compile("|".join(map(re.escape, special)) or "$^"),
            args.examples,
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


def add_rows(cfg: Config, keep: Keep, groups: list[list[dict]]) -> None:
    """Give each sample the columns of its row that are kept, in the data that the run was trained
    on.

    BadInput when that data is not there, or is another.
    """
    problems: list[Problem | None] = []
    parts = [part for source in train_sources(cfg, keep) for part in source.parts()]
    for source in parts:
        if is_preprocessed(source.path):
            source.layout.refuse_tokens(source.path)
        template = Template(source.prompt_type, cfg.training.prompt_type_path or "")
        rows = read_problems(source.path, source.layout.fitting(template)).rows
        while rows[-1] is None:  # as in data/prompts.py: the next set begins behind the last prompt
            rows.pop()
        problems += rows
    for group in groups:
        for sample in group:
            index = sample["prompt_index"]
            problem = problems[index] if index < len(problems) else None
            if problem is None or problem.answer != sample["ground_truth"]:
                raise BadInput(
                    f"{sample['place']}: row {index} of {cfg.actor_rollout.data_path} is not its "
                    "problem; give --config with the data of the run"
                )
            sample["row"] = problem.row


def rescore(
    cfg: Config,
    config: RewardConfig,
    groups: list[list[dict]],
    special: re.Pattern[str],
    shown: int,
) -> None:
    """Score the groups and print what changed; the reward, too, when it is made of these functions
    only and they are those of the run."""
    with_model = any(f"score/{MODEL}" in row for group in groups for row in group)
    same_sets = bool(config.of_sources) == any(source.name for source in train_sources(cfg))
    same_names = config.names == cfg.algorithm.verifier_function
    whole = same_names and same_sets and not with_model
    cases = (
        [
            RewardInput(
                row["prompt"],
                special.sub("", row["response"]),
                read_gold(row["ground_truth"]),
                row["response_length"],
                cfg.response_budget,
                row["truncated"],
                row=row.get("row") or {},
                source=row.get("source") or "",
            )
            for row in group
        ]
        for group in groups
    )
    with RewardExecutor(config) as executor:
        changes = {
            name: Changes() for name in [*executor.functions, *(["reward"] if whole else [])]
        }
        stream = tqdm(executor.stream(cases), total=len(groups), disable=None)
        for group, members in zip(groups, stream, strict=True):
            for row, scores in zip(group, members, strict=True):
                for name, score in scores.items():
                    _note(changes[name], row, _change(row, name, score), shown)
                if (
                    whole
                    and abs(executor.reward(scores, row.get("source") or "") - row["reward"]) > 1e-9
                ):
                    _note(
                        changes["reward"],
                        row,
                        f"{row['reward']:g} -> {executor.reward(scores, row.get('source') or ''):g}",
                        shown,
                    )
    print(f"{sum(map(len, groups))} samples scored again by {', '.join(config.functions)}")
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
