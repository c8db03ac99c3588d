"""What tools/preprocess_data.py has tokenised: `<prefix>_packed_<field>_document.bin` and .idx.

Two forms are read: labels may be the answer alone (the R1 handlers), or as long as input_ids, with
-100 on the prompt and then the answer and an end of text (AlpacaStyleInstructionHandler). Document
n comes from row n of the raw file; it is empty when the row was dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1zero.data.indexed import MAKE_AGAIN, Indexed, index_path, read_indexed, values_path
from r1zero.errors import BadInput

IGNORED = -100  # label of a token that is no answer


def stem(prefix: str | Path, field: str) -> Path:
    """Return the path of a field's files, without .bin or .idx."""
    return Path(f"{prefix}_packed_{field}_document")


def is_preprocessed(prefix: str | Path) -> bool:
    """Whether there is anything of a tokenised data set under this prefix."""
    # Not Path.exists, which raises for a text that is too long to be a path, such as a blend of
    # many.
    return any(
        os.path.exists(path)
        for field in ("input_ids", "labels")
        for path in (index_path(stem(prefix, field)), values_path(stem(prefix, field)))
    )


@dataclass(frozen=True, slots=True)
class PreprocessedRow:
    """One problem: `index` is its row in the raw file."""

    index: int
    prompt: np.ndarray  # int32 [prompt tokens]
    answer: np.ndarray  # int32 [answer tokens]


def read_preprocessed(prefix: str | Path, vocab_size: int) -> Iterator[PreprocessedRow]:
    """Yield the rows of a tokenised data set that are not empty.

    BadInput when a file is missing or damaged, the fields do not belong together, or a token id is
    not below `vocab_size`.
    """
    answers = index_path(stem(prefix, "labels"))
    if not answers.exists() and index_path(stem(prefix, "input_ids")).exists():
        raise BadInput(
            f"{prefix} has no {answers.name}, so nothing says which answers are right; "
            "preprocess it with --handler-name R1AlpacaStyleInstructionHandler"
        )
    inputs = read_indexed(stem(prefix, "input_ids"))
    labels = read_indexed(stem(prefix, "labels"))
    if len(inputs) != len(labels):
        raise BadInput(
            f"{prefix}: {len(inputs)} documents of input_ids, but {len(labels)} of labels; "
            f"{MAKE_AGAIN}"
        )
    _check_ids(inputs, inputs.values < 0, vocab_size)
    _check_ids(labels, (labels.values < 0) & (labels.values != IGNORED), vocab_size)
    if not len(inputs.values):
        raise BadInput(
            f"{prefix} holds no prompts; {MAKE_AGAIN} from a file with at least one problem"
        )
    for document in range(len(inputs)):
        prompt = inputs[document]
        answer = labels[document]
        if len(prompt) or len(answer):
            yield _row(prefix, document, prompt, answer)


def _check_ids(field: Indexed, negative: np.ndarray, vocab_size: int) -> None:
    wrong = np.flatnonzero(negative | (field.values >= vocab_size))
    if len(wrong):
        document = int(np.searchsorted(field.bounds, wrong[0], side="right")) - 1
        raise BadInput(
            f"{field.path}, document {document}: token id {field.values[wrong[0]]} is outside the "
            f"vocabulary of {vocab_size}; was it made with the tokenizer of another model?"
        )


def _row(
    prefix: str | Path, document: int, tokens: np.ndarray, labels: np.ndarray
) -> PreprocessedRow:
    """Tell prompt and answer apart."""
    given = labels != IGNORED
    if given.all():
        prompt = tokens
        answer = labels
    else:
        if given.any():
            start = int(given.argmax())
        else:
            start = len(labels)
        prompt = tokens[:start]
        answer = labels[start:]
        if not np.array_equal(answer, tokens[start:]):
            raise BadInput(
                f"{prefix}, document {document}: labels must be {IGNORED} on the prompt and then "
                f"repeat input_ids; {MAKE_AGAIN}"
            )
    if not len(prompt) or not len(answer):
        if len(prompt):
            missing = "answer"
        else:
            missing = "prompt"
        raise BadInput(f"{prefix}, document {document} has no {missing}; {MAKE_AGAIN}")
    return PreprocessedRow(document, prompt, answer)
