"""Worked examples in docstrings compute what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from support.multiproc import DEVICE

PACKAGE = Path(__file__).resolve().parents[2] / "r1zero"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_an_example_in_a_docstring_computes_what_it_shows(path):
    assert DEVICE.is_cpu  # what Megatron asks of CUDA is answered before it is imported
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0, f"no example of {module} is in a docstring"
    assert found.failed == 0, f"{found.failed} examples of {module} show something else"
