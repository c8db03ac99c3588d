"""Scores answers from a file, through the reward executor that scores them in training.

    python tools/score.py --input cases.jsonl [--verifier acc format] [--config CONFIG]

In, one JSON object a line: {"gold": "1/2", "response": "It is \\boxed{0.5}."}; "prompt" and, for
reward functions of length, "tokens", "limit" and "truncated" may be given, too, and the columns that
reward functions see. Out, one line for each in the same order:
{"outcome": "right", "scores": {"acc": 1.0, "format": 0.0}}; the outcome is that of the first
function: right, wrong, copied (if "prompt" is given), no_answer, graded, timeout or crash. Each line
is a group of its own to functions that compare responses. Settings, deadline and workers are those
of CONFIG (a file or a name under configs/), or the defaults.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import user_path
from r1zero.errors import BadInput
from r1zero.preflight.resolve import load_config
from r1zero.reward.choose import choose
from r1zero.reward.config import RewardConfig, reward_config
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.math.gold import read_gold, survey_golds
from r1zero.reward.types import Declaration, RewardInput

BAD_INPUT = 2
SHOWN = 20  # bad lines

T = TypeVar("T")


def main() -> int:
    """Score a file; returns the exit code."""
    parser = CommandLine(description="Score answers from a file.")
    parser.add_argument(
        "--input", required=True, type=user_path, help="JSON lines with gold and response"
    )
    parser.add_argument(
        "--verifier", nargs="+", metavar="FUNCTION", help="default: those of CONFIG, or acc format"
    )
    parser.add_argument(
        "--config", help="take reward functions and their settings from this configuration"
    )
    args = parser.parse_args()
    try:
        config = RewardConfig(names=["acc", "format"], weights=[1.0, 1.0])
        if args.config:
            cfg, _ = load_config(args.config)
            config = reward_config(cfg.algorithm, cfg.reward)
        if args.verifier:
            config = replace(config, names=args.verifier, weights=[1.0] * len(args.verifier))
        declared = [each.declared for each in choose(config.names, config.settings).values()]
        problems: list[str] = []
        cases = read_cases(args.input, declared, problems)
    except BadInput as error:
        problems = str(error).splitlines()
    if problems:
        return _refuse(problems)
    verdict = survey_golds([case.gold for case in cases])
    if verdict.odd and any(each.gives_verdict for each in declared):
        print(
            f"score.py: warning: {verdict.odd} of {verdict.total} golds do not look like "
            f"answers: {', '.join(verdict.examples)}",
            file=sys.stderr,
        )
    try:
        _score(cases, config)
    except RuntimeError as error:
        return _refuse([str(error)])
    return 0


def read_cases(
    path: Path, declared: Sequence[Declaration], problems: list[str]
) -> list[RewardInput]:
    """Read all cases, with what reward functions need; what is wrong with a line goes to
    `problems`. BadInput when there is no such file."""
    cases = []
    with_tokens = any(each.needs_tokens for each in declared)
    columns = [column for each in declared for column in each.columns]
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInput(f"--input: {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cases.append(_case(json.loads(line), with_tokens, columns))
        except (BadInput, ValueError, RecursionError) as error:  # what json and _case raise
            problems.append(f"{path}, line {number}: {error}")
    return cases


def _case(row: object, with_tokens: bool, columns: Sequence[str]) -> RewardInput:
    """Check one row. BadInput with what is wrong."""
    if not isinstance(row, dict):
        raise BadInput('it must be an object such as {"gold": "5", "response": "\\\\boxed{5}"}')

    def given(key: str, kinds: tuple[type[T], ...], wanted: str, default: object = None) -> T:
        value = row.get(key, default)
        if not isinstance(value, kinds) or (bool not in kinds and isinstance(value, bool)):
            if key in row:
                found = f"is {value!r:.80}"
            else:
                found = "is missing"
            raise BadInput(f"{key} {found}; it must be {wanted}")
        return value

    for column in columns:
        if column not in row:
            raise BadInput(f"{column} is missing; a reward function sees this column")
    lengths = None if with_tokens else 0
    return RewardInput(
        prompt=given("prompt", (str,), "a text", ""),
        response=given("response", (str,), "a text"),
        gold=read_gold(str(given("gold", (str, int, float), "a text or a number"))),
        tokens=given("tokens", (int,), "the length of the response", lengths),
        limit=given("limit", (int,), "the most tokens that a response may have", lengths),
        truncated=given("truncated", (bool,), "true or false", False),
        row={column: row[column] for column in columns},
    )


def _score(cases: list[RewardInput], config: RewardConfig) -> None:
    with RewardExecutor(config) as executor:
        stream = executor.stream([case] for case in cases)
        for [scores] in tqdm(stream, total=len(cases), unit="case", disable=None):
            outcome = next(iter(scores.values())).outcome.name.lower()
            values = {name: score.value for name, score in scores.items()}
            print(json.dumps({"outcome": outcome, "scores": values}))


def _refuse(problems: list[str]) -> int:
    for problem in problems[:SHOWN]:
        print(f"score.py: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"score.py: and {len(problems) - SHOWN} more", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `score.py ... | head` shall end quietly
    sys.exit(main())
