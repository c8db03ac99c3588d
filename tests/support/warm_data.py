"""What every rank of nearly every world reads: the data of the tiny model, read and tokenised once in
the process that forks the ranks.

Four thousand problems take a controller half a second and each other rank 0.15 s, which is a quarter
of a short run. Data sets of a test's own are read as ever, and so are these by launched runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1zero.data import problems, prompts
from r1zero.data.layout import ColumnLayout
from r1zero.data.problems import ProblemSet
from r1zero.preflight import datasets
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import resolve

_read: dict[tuple[str, str], ProblemSet] = {}
_tokenised: dict[tuple[str, ...], tuple[str, list[list[int]]]] = {}  # and by which tokenizer
_tokenize = prompts.tokenize


def read_tiny() -> None:
    """Read the embedded data, which must have been made, and have it known from now on."""
    cfg, _ = load_config("tiny", [])
    run = resolve(cfg, (), 1)
    tokenizer = prompts.load_tokenizer(run.tokenizer)
    for source in (*run.train_data, *run.eval_data):
        template = run.templates[source.prompt_type]
        layout = source.layout.fitting(template)
        found = problems.read_problems(source.path, layout)
        _read[str(source.path), repr(layout)] = found
        texts = [template.render(each.question, each.system) for each in found.problems]
        _tokenised[tuple(texts)] = _text_of(tokenizer), _tokenize(tokenizer, texts)
    prompts.read_problems = datasets.read_problems = known_problems  # type: ignore[attr-defined]
    prompts.tokenize = known_tokens


def known_problems(path: str | Path, layout: ColumnLayout) -> ProblemSet:
    """`read_problems`, as far as needed."""
    found = _read.get((str(path), repr(layout)))
    if found is None:
        return problems.read_problems(path, layout)
    return ProblemSet(list(found.rows), list(found.notes))


def known_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`tokenize`, as far as needed."""
    by, found = _tokenised.get(tuple(texts), ("", []))
    if by != _text_of(tokenizer):
        return _tokenize(tokenizer, texts)
    return [list(ids) for ids in found]


def _text_of(tokenizer: Any) -> str:
    """All that decides which tokens a text has."""
    text: str = tokenizer.backend_tokenizer.to_str()
    return text
