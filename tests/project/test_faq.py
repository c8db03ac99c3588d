"""docs/faq.md quotes what the program says: every sentence on it still stands in the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.sentences import says, sentences, text_of

ROOT = Path(__file__).resolve().parents[2]
QUOTED = re.compile(r"^\| `(.+?)` \| ", flags=re.MULTILINE)
# torch_npu's, and HCCL's codes of errors.
OF_OTHERS = {
    "NPU out of memory. Tried to allocate ...",
    "EI0006: ... Getting socket times out. ...",
    "EI0002: ...",
}
SENTENCE = 60  # shorter texts are pieces of one
FAQ = QUOTED.findall((ROOT / "docs" / "faq.md").read_text())


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return sentences()


def test_there_are_many() -> None:
    assert len(FAQ) > 50


@pytest.mark.parametrize("sentence", sorted(set(FAQ) - OF_OTHERS))
def test_the_program_says_it(sources: list[str], sentence: str) -> None:
    longest = max(sentence.split("..."), key=len)
    assert len(longest) > 8, "too little of it to be told from others"
    assert any(says(source, sentence) for source in sources)


@pytest.mark.parametrize("module", ["alarms", "invariants"])
def test_every_warning_and_every_broken_invariant_is_told(module: str) -> None:
    tree = ast.parse((ROOT / "r1zero" / "observe" / f"{module}.py").read_text())
    f_strings = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    told = [text for text in map(text_of, f_strings) if len(text) > SENTENCE]
    assert len(told) > 6
    for text in told:
        assert any(says(text, sentence) for sentence in FAQ), text


def test_no_sentence_stands_there_twice() -> None:
    assert len(FAQ) == len(set(FAQ))
