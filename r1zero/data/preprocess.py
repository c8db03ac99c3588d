"""Preprocessing: raw problems tokenised into .bin/.idx files, in several processes, in order.

A handler decides which fields a row becomes. The prompt is tokenised as training tokenises it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from r1zero.data.ends import refuse_split_ends
from r1zero.data.indexed import IndexedWriter
from r1zero.data.preprocessed import IGNORED, stem
from r1zero.data.prompts import detokenize, load_tokenizer, tokenize, vocabulary_of
from r1zero.data.row_reader import Problem
from r1zero.data.template import Template
from r1zero.errors import BadInput

Fields = dict[str, np.ndarray]  # int32 arrays by name, those of one row
Handler = Callable[[list[int], list[int], int], Fields]  # prompt, answer and end of text to fields
_ROWS_A_TASK = 256


def _fields(**fields: list[int]) -> Fields:
    return {"attention_mask": np.ones(len(fields["input_ids"]), np.int32)} | {
        name: np.asarray(ids, np.int32) for name, ids in fields.items()
    }


def _instruction(prompt: list[int], answer: list[int], end: int) -> Fields:
    """Prompt and answer in one sequence; labels of the same length, without those of the prompt."""
    answer = [*answer, end]
    return _fields(input_ids=prompt + answer, labels=[IGNORED] * len(prompt) + answer)


HANDLERS: dict[str, Handler] = {
    "R1AlpacaStyleInstructionHandler": lambda prompt, answer, end: _fields(
        input_ids=prompt, labels=answer
    ),
    "AlpacaStyleInstructionHandler": _instruction,
    "PPOAlpacaStyleInstructionHandler": lambda prompt, answer, end: _fields(input_ids=prompt),
}

ENDED = ("AlpacaStyleInstructionHandler",)  # handlers that put the end of text behind an answer


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows become fields; every process reads the rest from these files."""

    tokenizer: str  # folder
    prompt_type: str
    prompt_type_path: str
    handler: str
    too_long: int | None = None  # rows with a field of this many tokens or more are dropped


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """What a problem became: its fields, None when dropped, and how its answer changes on the way
    back."""

    fields: Fields | None
    too_long: bool = False
    change: str = ""  # empty when the tokens give the answer back as it was


@dataclass(slots=True)
class Summary:
    """What became of all rows."""

    rows: int = 0
    dropped: int = 0
    tokens: int = 0  # of input_ids
    changed: int = 0  # answers that their tokens do not give back as they were
    example: str = ""  # the first of them

    def count(self, row: TokenizedRow) -> None:
        """Take note of the next row."""
        self.rows += 1
        self.dropped += row.too_long
        self.tokens += 0 if row.fields is None else len(row.fields["input_ids"])
        self.changed += bool(row.change)
        if row.change and not self.example:
            self.example = f"row {self.rows}: {row.change}"


def preprocess(
    problems: Sequence[Problem | None],
    prefix: str,
    recipe: Recipe,
    workers: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> Summary:
    """Write the fields of all problems under `prefix`, complete or not at all; `advance` hears of
    rows done.

    A row without a problem becomes an empty document, as one that is dropped does.
    BadInput for a bad tokenizer or template and when no row is left, RuntimeError when a worker
    dies.
    """
    tokenizer, template = _tools(recipe)  # finds what is wrong before any process starts
    refuse_split_ends(template, vocabulary_of(tokenizer))
    if tokenizer.eos_token_id is None and recipe.handler in ENDED:
        raise BadInput(
            f"{recipe.tokenizer} names no end of text, which {recipe.handler} puts behind "
            "answers; set eos_token in its tokenizer_config.json"
        )
    names = list(HANDLERS[recipe.handler]([0], [0], 0))
    tasks = [problems[at : at + _ROWS_A_TASK] for at in range(0, len(problems), _ROWS_A_TASK)]
    summary = Summary()
    with IndexedWriter([stem(prefix, name) for name in names]) as writer:
        for rows in _results(partial(make_rows, recipe), tasks, workers):
            for row in rows:
                writer.add(None if row.fields is None else [row.fields[name] for name in names])
                summary.count(row)
            advance(len(rows))
        if not summary.tokens:
            raise BadInput(
                f"--seq-length {recipe.too_long}: every row has a field of that many tokens or "
                "more; give a larger one"
            )
    return summary


def make_rows(recipe: Recipe, rows: Sequence[Problem | None]) -> list[TokenizedRow]:
    """Tokenise problems and make their fields; what is no problem has none."""
    made = iter(_make_rows(recipe, [row for row in rows if row is not None]))
    return [TokenizedRow(None) if row is None else next(made) for row in rows]


def _make_rows(recipe: Recipe, problems: Sequence[Problem]) -> list[TokenizedRow]:
    tokenizer, template = _tools(recipe)
    prompts = tokenize(
        tokenizer, [template.render(each.question, each.system) for each in problems]
    )
    answers = tokenize(tokenizer, [each.answer for each in problems])
    made = []
    for problem, prompt, answer, back in zip(
        problems, prompts, answers, detokenize(tokenizer, answers, special=False), strict=True
    ):
        fields = HANDLERS[recipe.handler](prompt, answer, tokenizer.eos_token_id)
        fits = recipe.too_long is None or max(map(len, fields.values())) < recipe.too_long
        if back == problem.answer:
            change = ""
        else:
            change = f"{problem.answer!r} becomes {back!r}"
        made.append(TokenizedRow(fields if fits else None, not fits, change))
    return made


@lru_cache(maxsize=1)
def _tools(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Template]:
    """Load what the recipe names, once in a process."""
    return load_tokenizer(recipe.tokenizer), Template(recipe.prompt_type, recipe.prompt_type_path)


def _results(
    work: Callable[[Sequence[Problem | None]], list[TokenizedRow]],
    tasks: Sequence[Sequence[Problem | None]],
    workers: int,
) -> Iterator[list[TokenizedRow]]:
    """Yield the results of the tasks in order."""
    if workers == 1:
        yield from map(work, tasks)
        return
    # Fresh processes: a fork of one that has run the tokenizer's threads may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(work, tasks)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker died, perhaps for lack of memory, and nothing was written; try fewer "
            "--workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
