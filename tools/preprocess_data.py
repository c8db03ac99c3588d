#!/usr/bin/env python3
"""Tokenise problems into the .bin/.idx files that training reads with `data_path: PREFIX`.

    python tools/preprocess_data.py --input train.parquet --output-prefix dataset/math \
        --tokenizer-name-or-path models/Qwen2.5-7B-Instruct --handler-name R1AlpacaStyleInstructionHandler \
        --tokenizer-type PretrainedFromHF --workers 4 --log-interval 1000 --prompt-type qwen_r1 \
        --map-keys '{"prompt": "question", "query": "", "response": "ground_truth_answer", "system": ""}'

Writes dataset/math_packed_input_ids_document.bin and .idx, and the same for attention_mask and
labels; all appear at the end, complete. Document n is row n. Handlers:
R1AlpacaStyleInstructionHandler keeps prompt and answer apart, AlpacaStyleInstructionHandler writes
them as one sequence with labels -100 on the prompt (training reads both),
PPOAlpacaStyleInstructionHandler writes no labels. Exit codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from r1zero.config.command_line import CommandLine
from r1zero.config.paths import expand
from r1zero.data.indexed import check_writable
from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import ProblemSet, parse_json, read_problems
from r1zero.data.survey import DataSet, survey
from r1zero.data.template import TEMPLATES, Template
from r1zero.errors import (
    BadInput,
    nearest,
)

PARTS = ("prompt", "query", "response", "system")
NOT_READ = ("history", "chosen", "rejected")  # parts of other handlers: accepted when empty
DEFAULT_KEYS = '{"prompt": "question", "response": "ground_truth_answer"}'


def main() -> int:
    """Preprocess; returns the exit code."""
    args = parse()
    try:
        return run(args)
    except (BadInput, RuntimeError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        if isinstance(error, BadInput):
            return 2
        return 1


def parse() -> argparse.Namespace:
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        required=True,
        type=expand,
        help="a .parquet, .arrow, .jsonl, .json, .csv or .tsv file, or a folder of files of one "
        "kind, without those of test or validation sets",
    )
    add(
        "--output-prefix",
        required=True,
        type=expand,
        help="path and beginning of the names of the files to write",
    )
    add(
        "--tokenizer-name-or-path",
        required=True,
        type=expand,
        help="folder with a Hugging Face tokenizer",
    )
    add("--tokenizer-type", default="PretrainedFromHF", choices=["PretrainedFromHF"])
    add(
        "--handler-name",
        default="R1AlpacaStyleInstructionHandler",
        help="what a row becomes, see above",
    )
    add("--prompt-type", default="qwen_r1", help="name of a prompt template")
    add("--prompt-type-path", default=str(TEMPLATES), type=expand, help="templates file")
    add(
        "--map-keys",
        default=DEFAULT_KEYS,
        metavar="JSON",
        help=f"columns, with dots into structs; default {DEFAULT_KEYS}",
    )
    add("--skip-bad-rows", action="store_true", help="leave bad rows out, such as without answer")
    add(
        "--dataset-additional-keys",
        nargs="*",
        default=["labels"],
        metavar="KEY",
        help="labels, which the R1 handler always writes",
    )
    add("--seq-length", type=at_least_1, help="drop rows with a field of this many tokens or more")
    add("--workers", type=at_least_1, default=1, help="processes that tokenise")
    add(
        "--log-interval",
        type=at_least_1,
        default=100,
        help="rows between two updates of the progress bar",
    )
    for flag in ("--n-subs", "--cache-dir", "--seed"):
        add(flag, help="accepted, no effect")
    for flag in ("--append-eod", "--overwrite-cache"):
        add(flag, action="store_true", help="accepted, no effect")
    return parser.parse_args()


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Look at the cheap things first, then read, then import what is heavy."""
    keys = map_keys(args.map_keys)
    if args.dataset_additional_keys not in ([], ["labels"]):
        raise BadInput(
            f"--dataset-additional-keys {' '.join(args.dataset_additional_keys)}: "
            "only labels can be added"
        )
    check_writable(Path(args.output_prefix))
    template = Template(args.prompt_type, args.prompt_type_path)
    layout = ColumnLayout(
        keys, skip_bad_rows=args.skip_bad_rows, columns_key="--map-keys", skip_key="--skip-bad-rows"
    )
    data = read_problems(args.input, layout.fitting(template))
    for line in remarks(args.input, data):
        print(line, file=sys.stderr)

    from r1zero.data.preprocess import HANDLERS, Recipe, preprocess

    if args.handler_name not in HANDLERS:
        raise BadInput(
            f"--handler-name {args.handler_name} is unknown"
            f"{nearest(args.handler_name, HANDLERS)}; there are {', '.join(HANDLERS)}"
        )
    recipe = Recipe(
        args.tokenizer_name_or_path,
        args.prompt_type,
        args.prompt_type_path,
        args.handler_name,
        args.seq_length,
    )
    with tqdm(total=len(data.rows), unit="row", miniters=args.log_interval) as bar:
        done = preprocess(data.rows, args.output_prefix, recipe, args.workers, bar.update)
    if done.changed:
        print(
            (
                f"warning: {done.changed} answers change when their tokens become text again; "
                f"{done.example}"
            ),
            file=sys.stderr,
        )
    left_out = len(data.rows) - len(data.problems)
    print(
        f"{done.rows - done.dropped - left_out} rows, {done.tokens} tokens in "
        f"{args.output_prefix}_packed_*_document.bin; {done.dropped} rows dropped by --seq-length"
        + f", {left_out} left out"
        * bool(left_out)
    )
    return 0


def remarks(path: str, data: ProblemSet) -> list[str]:
    """What is worth knowing about the data."""
    questions = [problem.question for problem in data.problems]
    answers = [problem.answer for problem in data.problems]
    return data.notes + survey([DataSet("--input", path, questions, answers)], [], compared=True)


def map_keys(text: str) -> dict[str, str]:
    """Read --map-keys. BadInput for unknown parts."""
    given = parse_json("--map-keys", text)
    if not isinstance(given, dict) or not all(isinstance(column, str) for column in given.values()):
        raise BadInput(
            f"--map-keys {text} must be a JSON object that maps parts to names of columns"
        )
    for part, column in given.items():
        if part in NOT_READ and column:
            raise BadInput(
                f'--map-keys: {part}={column!r}, but no handler here reads {part}; set it to ""'
            )
        if part not in PARTS + NOT_READ:
            raise BadInput(
                f"--map-keys: {part!r} is not one of {', '.join(PARTS)}{nearest(part, PARTS)}"
            )
    return given


if __name__ == "__main__":
    sys.exit(main())
