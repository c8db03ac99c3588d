r"""Verdicts worked out from the mathematics, and the shapes of responses.

A row of CASES is (right answer, given answer, whether they are the same), as LaTeX between the braces of
`\boxed{}`. Chinese words are escaped: \u5143 yuan, \u4e2a a counting word, \u5398\u7c73 centimetre,
\u5e73\u65b9 square, \u5468\u4e8c Tuesday, \u5468\u4e09 Wednesday, \u548c and, \u7ea6 about.
"""

import pytest

from r1zero.batch import Outcome, Score
from r1zero.reward.format import answer_part, extract_answer, last_box
from r1zero.reward.math_answer import MAX_CHARACTERS, same
from r1zero.reward.rules import RULES, AccuracyValues, select_rules

CASES = {
    "integers": [
        ("34", "34", True),
        ("34", "35", False),
        ("34", "034", True),
        ("5", "+5", True),
        ("-5", "5", False),
        ("-5", "\u22125", True),
        ("5", "5.", True),
        ("5", "{5}", True),
        ("5", r"\ 5\,", True),
        ("5", "x=5", True),
        ("x=5", "y=5", False),
        ("1234", "1,234", True),
        ("1234", "1{,}234", True),
        ("1234", r"1\,234", True),
        ("1234", r"1,\!234", True),
        ("10000", "10 000", True),
        ("1234", "1234567", False),
        ("7", "\uff17", True),
        ("1000", r"10^3", True),
        ("1024", "2^{10}", True),
        ("2", "2^2", False),
        ("2", "2^{3}", False),
        ("6", "3!", True),
        ("10", r"\binom{5}{2}", True),
        ("10", r"\binom{5}{3}", True),
        ("11", r"\binom{5}{2}", False),
    ],
    "fractions": [
        (r"\frac{1}{2}", r"\frac12", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
        (r"\frac{1}{2}", "0.5", True),
        ("0.5", r"\tfrac{1}{2}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"\frac{1}{2}", "2", False),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        (r"-\frac{1}{2}", "-1/2", True),
        (r"-\frac{1}{2}", r"\frac{1}{-2}", True),
        (r"-\frac{1}{2}", r"\frac{1}{2}", False),
        (r"\frac{3}{2}", r"1\frac{1}{2}", True),
        (r"\frac{3}{2}", "1 1/2", True),
        (r"\frac{3}{2}", "1.5", True),
        (r"11\frac{1}{2}", r"\frac{11}{2}", False),
        (r"\frac{1}{3}", r"0.\overline{3}", True),
        ("0", r"0.\overline{3}", False),
        (r"\frac{1}{6}", r"0.1\overline{6}", True),
        (r"\frac{10}{4}", "2.5", True),
        (r"\frac{1}{0}", "0", False),
        (r"2007 + \frac{\pi}{2}", r"2007+\frac\pi 2", True),
    ],
    "decimals": [
        ("0.1", "0.10", True),
        ("10", "10.0", True),
        (r"\frac{3}{4}", ".75", True),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.3333", False),
        ("34", "34.001", False),
        ("34", "34.0000001", True),
        ("0.0000001", "0", False),
        ("0.0000001", "0.0000002", False),
        ("1.2", "1,2", False),
        ("1500", r"1.5 \times 10^3", True),
        ("0.0015", r"1.5 \times 10^{-3}", True),
        ("1000", "1e3", True),
        (r"2\pi", "6.283185", True),
        (r"2\pi", "6.28", False),
        (r"\frac{22}{7}", r"\pi", False),
        ("3.14", r"\approx 3.14", True),
    ],
    "no factor of a hundred": [
        ("0.5", "50", False),
        ("50", "0.5", False),
        ("34", "3400", False),
        ("1", "100", False),
    ],
    "percent": [
        (r"50\%", "50", True),
        ("50", r"50\%", True),
        (r"50\%", "0.5", True),
        (r"50\%", r"\frac{1}{2}", True),
        (r"50\%", r"50 \text{ percent}", True),
        (r"50\%", r"5\%", False),
        (r"50\%", r"500", False),
    ],
    "units": [
        ("5", r"5 \text{ cm}", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{ cm}", r"5\,\mathrm{cm}", True),
        (r"5\text{ cm}", r"5 \text{ centimeters}", True),
        (r"5\text{ cm}", r"5\text{ m}", False),
        (r"1\text{ m}", r"100\text{ cm}", True),
        (r"5\text{ cm}", r"5\text{ cm}^2", False),
        (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True),
        (r"\frac{1}{2}\text{ hours}", r"30\text{ minutes}", True),
        ("5", "5 m", True),
        ("5", "5 apples", True),
        ("5m", "5", False),
        ("2", r"2\sin x", False),
        ("2", "2 sqrt x", False),
        (r"\$5.00", "5", True),
        ("5", r"\$5", True),
        (r"\$32,348", "32348", True),
        (r"5.4 \text{ cents}", "5.4", True),
        (r"50 \text{ cents}", r"\$0.50", True),
        (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}", True),
        (r"3\sqrt{2}", r"3\sqrt{2} cm", True),
        (r"9\pi", r"9\pi \text{ square units}", True),
        (r"\text{2 hours}", "2", True),
    ],
    "degrees": [
        (r"90^\circ", "90", True),
        ("90", r"90^{\circ}", True),
        ("90", "90\u00b0", True),
        ("90", r"90 \text{ degrees}", True),
        (r"90^\circ", r"91^\circ", False),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", True),
    ],
    "radicals and constants": [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"2\sqrt3", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("2", r"\sqrt[3]{8}", True),
        ("3", r"\log_2 8", True),
        (r"\pi", r"\frac{2\pi}{2}", True),
        (r"\pi", "\u03c0", True),
        (r"\infty", r"-\infty", False),
        (r"\infty", "\u221e", True),
    ],
    "algebra": [
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+1", False),
        ("x+m", "m + x", True),
        ("m+n", "n+m", True),
        (r"\frac{a}{b}", "a/b", True),
        ("x^2", "y^2", False),
        ("p-q", "q-p", False),
        ("xy", "yx", True),
        (r"\frac{x+1}{2}", "(x+1)/2", True),
        (r"x_1", "x_2", False),
        ("|x|", "x", False),
        ("y=2x+1", "y = 1+2x", True),
        ("y=2x+1", "y = 2x-1", False),
        ("x+y=1", "1", False),
        ("x^2", "f(x)=x^2", True),
        ("1+2i", "2i+1", True),
        ("1+2i", "1-2i", False),
        ("2i", "(1+i)^2", True),
        ("-1", r"e^{i\pi}", True),
        ("i", r"\sqrt{-1}", True),
    ],
    "tuples": [
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        ("(1,2)", r"\left(1,2\right)", True),
        ("(1,2)", "1,2", True),
        ("(1,2)", "(1,2,3)", False),
        ("(1,2)", "x=1, y=2", True),
        ("(1,2)", "y=2, x=1", True),
        (r"(\frac{1}{2}, -3)", "(0.5,-3)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2,3)", False),
    ],
    "intervals": [
        ("[1,2]", "(1,2)", False),
        ("(1,2]", "[1,2)", False),
        ("[1,2]", "[1,2]", True),
        (r"(-\infty,5]", r"x \le 5", True),
        (r"x \le 5", r"(-\infty,5]", True),
        (r"(-\infty,5]", "x < 5", False),
        ("(1,2)", "1<x<2", True),
        (r"x \in [-2,7]", "[-2,7]", True),
        (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)", True),
        (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)", False),
        (r"x \le 5", r"5 \ge x", True),
        (r"x \le 5", r"x \ge 5", False),
    ],
    "sets and lists": [
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\{1,2\}", "2, 1", True),
        (r"\{1,2\}", r"\{1,3\}", False),
        (r"\{3,5\}", "(3,5)", False),
        ("(3,5)", r"\{3,5\}", False),
        ("3,5", "5, 3", True),
        ("3,5", r"3 \text{ and } 5", True),
        ("2,3", r"x=2 \text{ or } x=3", True),
        ("3,5", "3", False),
        ("3", "3, 5", False),
        ("3", r"3 \text{ or } 5", False),
        ("3,5", "3,5,7", False),
        ("100,200", "200, 100", True),
        ("a=1,b=2", "b=2,a=1", True),
        ("a=1,b=2", "a=2,b=1", False),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}", True),
        (r"\pm 2", "2, -2", True),
        (r"\pm 2", "2", False),
        (r"\emptyset", r"\{\}", True),
    ],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix}1&0\\0&-1\end{pmatrix}", False),
        (r"\begin{pmatrix}1/5\\-2\end{pmatrix}", r"\begin{pmatrix}\frac{1}{5}\\-2\end{pmatrix}", True),
    ],
    "bases and ratios": [
        ("52_8", "52_{8}", True),
        ("52_8", "52", True),
        ("1010_2", "1010_3", False),
        ("2:3", r"\frac{2}{3}", True),
        ("2:3", "3:2", False),
    ],
    "words": [
        (r"\text{Tuesday}", "Tuesday", True),
        (r"\text{Tuesday}", r"\text{tuesday}", True),
        (r"\text{Tuesday}", "Monday", False),
        ("Tuesday", r"\textbf{Tuesday}", True),
        (r"\text{even}", r"\text{odd}", False),
        (r"\text{evil}", "live", False),
        (r"\text{No solution}", r"\text{no solution}", True),
        (r"\text{even}", "2", False),
    ],
    "choices": [
        ("C", r"\text{(C)}", True),
        (r"\text{(C)}", "C", True),
        (r"\text{(C)},", "C", True),
        ("C", r"\textbf{(C)}\ 5", True),
        ("C", "C. 12", True),
        ("C", "c", True),
        ("C", "B", False),
        ("C", r"\textbf{(B)}\ C", False),
        ("C", "AC", False),
        ("C", "(C) or (B)", False),
        ("C", "(C) (B)", False),
        ("C", "C, B", False),
    ],
    "Chinese": [
        ("5", "5\u5143", True),
        ("5", "5\u4e2a", True),
        ("5", r"5\text{\u4e2a}".replace(r"\u4e2a", "\u4e2a"), True),
        ("5", "\u7ea65", True),
        ("15\u5398\u7c73", r"15\text{ cm}", True),
        (r"15\text{ cm}^2", "15\u5e73\u65b9\u5398\u7c73", True),
        (r"15\text{ cm}^2", "15\u5398\u7c73", False),
        ("3,5", "3\u548c5", True),
        ("(1,2)", "\uff081\uff0c2\uff09", True),
        ("\u5468\u4e8c", r"\text{%s}" % "\u5468\u4e8c", True),
        ("\u5468\u4e8c", "\u5468\u4e09", False),
        ("5", "6\u5143", False),
    ],
    "nothing to read": [
        ("5", r"\text{}", False),
        ("5", "five apples", False),
        ("5", r"\frac{1}{", False),
        ("5", "\x00", False),
        ("5", "\ud800", False),
        ("5", "\u202e5\u202c", True),
        ("5", "5" * (MAX_CHARACTERS + 1), False),
        ("5", "?", False),
    ],
}
ROWS = [pytest.param(*row, id=f"{kind}-{n}") for kind, rows in CASES.items() for n, row in enumerate(rows)]


@pytest.mark.parametrize(("gold", "given", "verdict"), ROWS)
def test_verdict_is_that_of_the_mathematics(gold: str, given: str, verdict: bool) -> None:
    assert same(gold, given) is verdict


def test_table_is_large() -> None:
    assert len(ROWS) >= 200


BOXES = [
    (r"\boxed{34}", "34"),
    (r"\boxed {34}", "34"),
    (r"\boxed{ 34 }", "34"),
    (r"\fbox{34}", "34"),
    (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{34}. The word boxed appears", "34"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{[0, \{}", r"[0, \{"),
    (r"\boxed{\boxed{5}}", "{5}"),
    (r"\boxed{x=\fbox{5}}", "x={5}"),
    (r"\boxed{1} \boxed{2", "1"),
    (r"\boxed{1 \boxed{2}", "2"),
    (r"\boxed{a\\}", r"a\\"),
    ("\\boxed{1\n+2}", "1\n+2"),
    (r"\boxed{5", None),
    ("boxed{5}", None),
    ("boxed 5", None),
    (r"\boxed{\}", None),
    ("", None),
    (r"\boxed{}", ""),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_complete_box_is_found(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_deep_and_long_texts_take_linear_time() -> None:
    for text in ("\\boxed{" * 150_000, "{" * 1_000_000, "\\boxed" + " " * 1_000_000, "}" * 1_000_000):
        assert extract_answer(text) is None
        assert RULES["format"](text, "").value == 0
    assert RULES["step"]("\n" * 1_000_000 + "\t " * 100_000, "").value == 0


def test_answer_tag_comes_before_other_boxes() -> None:
    assert extract_answer(r"<think>\boxed{34}</think><answer>\boxed{35}</answer>") == "35"
    assert extract_answer(r"<answer>\boxed{1}</answer> \boxed{2}") == "1"
    assert extract_answer(r"<answer>\boxed{1}</answer><answer>\boxed{2}") == "2"
    assert extract_answer(r"<think>\boxed{34}</think><answer>34</answer>") is None
    assert extract_answer(r"so \boxed{34}") == "34"
    assert answer_part("no tags") == "no tags"


GOOD = r"<think>a</think><answer>\boxed{1}</answer>"
# (response, format, strict_format)
SHAPES = [
    (GOOD, 1, 1),
    ("<think>a\nb</think>\n <answer>So\n$\\boxed{\\frac{1}{2}}$.\n</answer>", 1, 1),
    (r"<think></think><answer>\boxed{1}</answer>", 1, 1),
    (GOOD + "\n ", 1, -1),
    (r"<think>\boxed{1}</think><answer>\boxed{1}</answer>", 1, -1),
    (r"<think>a</think><answer>\boxed{1} or \boxed{2}</answer>", 1, 1),
    (" " + GOOD, 0, -1),
    (GOOD + " text", 0, -1),
    (GOOD + "\ntext", 0, -1),
    (r"<think>a</think> x <answer>\boxed{1}</answer>", 0, -1),
    (r"<think>a<think>b</think><answer>\boxed{1}</answer>", 0, -1),
    (GOOD + GOOD, 0, -1),
    (r"<think>a</think><answer>\boxed{1}</answer></answer>", 0, -1),
    (r"<think>a</think><answer>1</answer>", 0, -1),
    (r"<think>a</think><answer>\boxed{}</answer>", 0, -1),
    (r"<think>a</think><answer>\boxed{1</answer>", 0, -1),
    (r"<think>\boxed{1}</think><answer>1</answer>", 0, -1),
    (r"<answer>\boxed{1}</answer><think>a</think>", 0, -1),
    (r"<think><answer></think>\boxed{1}</answer>", 0, -1),
    (r"<think>a</answer></think><answer>\boxed{1}", 0, -1),
    (r"a</think><answer>\boxed{1}</answer>", 0, -1),
    (r"<think>a</think><answer>\boxed{1}", 0, -1),
    (r"<THINK>a</THINK><answer>\boxed{1}</answer>", 0, -1),
    ("", 0, -1),
]


@pytest.mark.parametrize(("response", "plain", "strict"), SHAPES)
def test_format_is_exact(response: str, plain: float, strict: float) -> None:
    assert RULES["format"](response, "1") == Score(plain, Outcome.RIGHT if plain == 1 else Outcome.WRONG)
    outcome = Outcome.RIGHT if strict == 1 else Outcome.WRONG
    assert RULES["strict_format"](response, "1") == Score(strict, outcome)


@pytest.mark.parametrize(
    ("response", "thirds"),
    [
        ("Step 1: x Step 2: y", 2),
        ("1. a\n2. b\n3. c", 3),
        ("First, a. Next, b. Finally, c. Second, d.", 3),
        ("x\n- a\n- b\n* c", 3),
        ("3.14 is pi", 0),
        ("nothing", 0),
    ],
)
def test_steps_are_counted_up_to_three(response: str, thirds: int) -> None:
    assert RULES["reasoning_steps"](response, "").value == pytest.approx(thirds / 3)
    assert RULES["step"] is RULES["reasoning_steps"]


def test_accuracy_has_three_values() -> None:
    right, wrong, none = r"\boxed{34}", r"\boxed{35}", "the answer is 34"
    acc = select_rules(["acc"])["acc"]
    assert acc(right, "34") == Score(1.0, Outcome.RIGHT)
    assert acc(wrong, "34") == Score(-1.0, Outcome.WRONG)
    assert acc(none, "34") == Score(-1.0, Outcome.NO_ANSWER)
    three_levels = select_rules(["acc"], AccuracyValues(wrong=-0.5))["acc"]
    assert [three_levels(each, "34").value for each in (right, wrong, none)] == [1.0, -0.5, -1.0]
    assert [RULES["base_acc"](each, "34").value for each in (right, wrong, none)] == [1.0, 0.0, 0.0]
    assert acc.failure(Outcome.TIMEOUT) == Score(-1.0, Outcome.TIMEOUT)


def test_unknown_scorer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="'acurracy'; did you mean '(base_)?acc'"):
        select_rules(["acurracy"])
    with pytest.raises(ValueError, match="twice"):
        select_rules(["acc", "acc"])
