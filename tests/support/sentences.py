"""What the program can say: all texts of its sources, with a hole where a value goes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLE = "\N{HORIZONTAL ELLIPSIS}"
FORMATTED = re.compile(r"%[-+.\d]*[sdfgr]%?|\{\w*\}")  # of logging and str.format
SHELL_VALUE = re.compile(r"\$\{[^}]*\}|\$\(\(.*?\)\)|\$\w+|\$\*")
JOINED_LINES = re.compile(r'" \\\n\s*"|\\\n\s*')


def sentences() -> list[str]:
    """Every text of the package, the tools and the scripts, on one line."""
    found: list[str] = []
    for folder in ("r1zero", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += texts(ast.parse(path.read_text()))
    for path in (
        ROOT / "launch.sh",
        ROOT / "tools" / "setup_env.sh",
        ROOT / "tools" / "slurm.sbatch",
    ):
        script = JOINED_LINES.sub(" ", path.read_text())
        found += SHELL_VALUE.sub(HOLE, script).split("\n")
    return [" ".join(text.split()) for text in found]


def texts(tree: ast.AST) -> Iterator[str]:
    """The string constants and f-strings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield text_of(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield FORMATTED.sub(HOLE, node.value)


def text_of(f_string: ast.JoinedStr) -> str:
    """An f-string with holes."""
    parts = [
        str(part.value) if isinstance(part, ast.Constant) else HOLE for part in f_string.values
    ]
    return "".join(parts)


def says(source: str, sentence: str) -> bool:
    """Whether a source's text could be this sentence, in which `...` stands for values.

    The pieces between them must stand in it in this order; a value may cover text of the source.
    """
    place = 0
    for piece in sentence.split("..."):
        found = source.find(piece.strip(), place)
        if found < 0:
            return False
        place = found + len(piece.strip())
    return True
