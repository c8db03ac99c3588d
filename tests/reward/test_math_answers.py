r"""The comparison of answers, on cases that were worked out from the mathematics, and on hostile
texts.

A row of answer_cases.jsonl is a right answer, an answer as it stands between the braces of
`\boxed{}`, whether that is right, and what the case is about. No verdict was taken from a grader.
"""

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from r1zero.reward.math.grade import _same, same
from r1zero.reward.math.reading import MAX_CHARACTERS

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "answer_cases.jsonl").read_text("ascii").splitlines()
]


def test_every_verdict_is_that_of_the_mathematics(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [case for case in CASES if same(case["gold"], case["answer"]) is not case["right"]]
    for case in wrong:
        print(f"{case['kind']}: {case['gold']!r} and {case['answer']!r} should be {case['right']}")
    assert not wrong, f"{len(wrong)} of {len(CASES)} verdicts are wrong; see the list above"


def test_cases_are_many_and_of_both_verdicts_in_every_kind() -> None:
    assert len(CASES) >= 1900
    assert len({(case["gold"], case["answer"]) for case in CASES}) == len(CASES)
    counts = Counter((case["kind"], case["right"]) for case in CASES)
    for kind in {case["kind"] for case in CASES} - {
        "two answers at once",
        "no factor of a hundred",
    }:
        right, wrong = counts[kind, True], counts[kind, False]
        assert wrong > 0 and (right > 0 or kind == "nothing to read"), kind


def test_every_right_answer_is_itself() -> None:
    golds = {case["gold"] for case in CASES}
    assert [gold for gold in golds if not same(gold, gold)] == []
    assert [gold for gold in golds if not same(rf"\boxed{{{gold}}}", f" ${gold}$ ")] == []


HOSTILE = [
    "9^{9^{9^{9^{9}}}}",
    "9^9^9^9^9^9",
    "99999!!!!",
    "5" + "!" * 900,
    "5" + "%" * 900,
    r"\sin 5" + "^\\circ" * 140,
    "2!^" * 300 + "2",
    r"1\over " * 120 + "2",
    r"\binom{99999999}{33333333}",
    "1e999",
    r"\exp(\exp(\exp(99)))",
    r"\sin(9^{99999})",
    r"2^{-9^{9^9}}",
    "1/" * 400 + "1",
    "1-" * 400 + "1",
    "-" * 900 + "1",
    "2^" * 450 + "2",
    "(" * 499 + "5" + ")" * 499,
    "{" * 499 + "5" + "}" * 499,
    r"\sqrt" * 180 + "5",
    r"\frac{1}{" * 100 + "5" + "}" * 100,
    r"\pm" * 300 + "1",
    "x+" * 450 + "x",
    "x" * 999,
    ",".join("x" * 480),
    ",".join("12" * 240),
    "0." * 480,
    ".km" * 300,
    "9" * 999,
    "1,111" * 190,
    "\u00bd" * 900,  # one half
    "\ufdfa" * 900,  # one character that stands for eighteen
    "\u96f6" * 900,  # zero
    "one hundred " * 80,
    "5 " + "million " * 120,
    "5" + "\u4ebf" * 900,  # hundred million
    "\u4e00\u70b9" + "\u4e94" * 900,  # one point five five ...
    "A" + ", a" * 300,
    "1e-999 \\approx 1e-998",
    "5 \\approx " * 90 + "6",
    r"\text{" * 160,
    r"\begin{pmatrix}" + "1&" * 400 + r"\end{pmatrix}",
    "5\x00",
    "\u202e5\u202c6",
    "\ud800",
    "a" * 500 + "!",
    "5 " + "a" * 400 + "1",
    "$" * 999,
    "\\" * 999,
    " " * 900 + "6",
    "x=" * 480,
    "<" * 900,
    "[" * 500 + "]" * 400,
    "5" * (MAX_CHARACTERS + 1),
]
GOLDS = [
    "5",
    r"\frac{1}{2}",
    "x+1",
    "(1,2)",
    "[1,2)",
    r"\{1,2\}",
    "x+y=1",
    r"\text{Tuesday}",
    "C",
    r"5\text{ cm}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_at_once(text: str) -> None:
    start = time.process_time()
    assert [gold for gold in GOLDS if same(gold, text)] == []
    assert same(text, "5") is False
    assert time.process_time() - start < 1.0 * len(GOLDS), (
        "a comparison without algebra took too long"
    )
    assert sys.getrecursionlimit() == 1000


def test_fault_of_ours_is_a_wrong_answer_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from r1zero.reward.math import copied, grade

    def fail(*_: object) -> bool:
        raise ValueError("gamma function pole")

    monkeypatch.setattr(logging.getLogger("r1zero"), "propagate", True)
    monkeypatch.setattr(grade, "same_answer", fail)
    assert same("n > 3", "n! > 3") is False
    assert same("n > 3", "n>3") is True, "what needs no comparison has none that fails"
    monkeypatch.setattr(copied, "_form", fail)
    assert grade.is_copied("What is 2+2?", "4", "2+2") is True
    assert "ValueError: gamma function pole" in caplog.text and "n! > 3" in caplog.text
    assert len(caplog.records) == 2


@pytest.mark.slow
def test_no_odd_value_is_an_exception() -> None:
    """Poles, complex numbers, zeros and infinities wherever a value may stand."""
    odd = [
        "(-1)!",
        r"\frac{1}{0}",
        r"\infty",
        "i",
        "0^0",
        r"\ln 0",
        r"\binom{-1}{3}",
        "x!",
        "0^{-1}",
        r"\gcd(1/2, i)",
        r"\max(i, 2)",
        r"7 \bmod 0",
        r"\arcsin(5)",
        "(-2)^{1/2}",
        r"\sqrt[0]{2}",
        r"\log_1 5",
        "1.5!",
        r"\tan\frac{\pi}{2}",
    ]
    frames = [
        "%s",
        "%s < 2",
        "x! > %s",
        "(%s, 1)",
        "[%s, 3]",
        r"\{%s\}",
        "%s:3",
        "x = %s",
        "%s x^2 + y^2 = 1",
        r"\begin{pmatrix}%s\\1\end{pmatrix}",
        r"%s\%%",
        r"5 \pm %s",
        "|x| < %s",
    ]
    for gold in ("5", "x+y=1", "[1,2)", r"\{1,2\}"):
        for frame in frames:
            for value in odd:
                assert _same(gold, frame % value) is not True, (gold, frame % value)


def test_right_answer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from r1zero.reward.math import reading

    read = []
    monkeypatch.setattr(reading, "readings", lambda text, trusted: read.append(text) or [])
    for answer in ("1", "2", "3"):
        same("31415 + 92653", answer)
    assert sum(text.startswith("31415") for text in read) == 1
