"""Scorers one by one: shapes of responses, values worked by hand from the formulas, custom ones."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from r1zero.config.settings import default_settings, read_settings
from r1zero.errors import BadInput, Diagnostics
from r1zero.reward.boxes import extract_answer
from r1zero.reward.choose import check_names, choose
from r1zero.reward.functions import REWARD_FUNCTIONS
from r1zero.reward.loaded import load_function
from r1zero.reward.types import RewardInput
from r1zero.types import Outcome, Score


def case(
    response: str = "", gold: str = "", tokens: int = 0, limit: int = 100, right: bool | None = None
) -> RewardInput:
    return RewardInput("q", response, gold, tokens, limit, truncated=False, right=right)


def scores(name: str, cases: Sequence[RewardInput], **settings: object) -> list[Score]:
    shares = "acc" if name == "base_acc" else name
    return load_function(name, {shares: settings}).score(cases)


def score(name: str, response: str, gold: str = "1", **settings: object) -> Score:
    [found] = scores(name, [case(response, gold)], **settings)
    return found


def values(name: str, cases: Sequence[RewardInput], **settings: object) -> list[float]:
    found = scores(name, cases, **settings)
    assert all(each.outcome is Outcome.GRADED for each in found)
    return [each.value for each in found]


# (response, answer)
ANSWERS = [
    (r"\boxed{34}", "34"),
    (r"\boxed {34}", "34"),
    ("\\boxed\n{34}", "34"),
    (r"\boxed{ 34 }", "34"),
    (r"\fbox{34}", "34"),
    (r"\\boxed{34}", "34"),
    (r"\boxed{34}. The word boxed appears", "34"),
    (r"\boxed{1} then \boxed{2} then \boxed{3", "2"),
    (r"\boxed{1 \boxed{2}", "2"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{[0, \{}", r"[0, \{"),
    (r"\boxed{a\\}", r"a\\"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
    ("\\boxed{1\n+2}", "1\n+2"),
    (r"\boxed{\boxed{5}}", "{5}"),
    (r"\boxed{x=\fbox{5}}", "x={5}"),
    (r"\boxed 5", "5"),
    (r"\boxed 5$", "5"),
    (r"$\boxed5$", "5"),
    (r"\boxed -3.", "-3."),
    (r"\boxed 3/4.", "3/4."),
    (r"\boxed C$", "C"),
    (r"I will use \boxed and answer \boxed{7}, in \boxed notation", "7"),
    (r"\boxed{1} or \boxed 2", "2"),
    (r"\boxed 1 or \boxed{2}", "2"),
    (r"\boxed{x = \fbox 5}", r"x = \fbox 5"),
    (r"\boxed{1 \boxed 2", "2"),
    (r"<think>\boxed{34}</think> so \boxed{35}", "35"),
    (r"<think>\boxed{34}</think><answer>\boxed{35}</answer>", "35"),
    (r"<answer>\boxed{1}</answer> \boxed{2}", "1"),
    (r"<answer>\boxed{1}</answer><answer>\boxed{2}", "2"),
    (r"<think>\boxed{34}</think><answer>34</answer>", None),
    (r"<answer>\boxed{1}</answer><answer></answer>", None),
    (r"\boxed{5} or \boxed{}", None),
    (r"\boxed{5} or \boxed{\,}", None),
    (r"\boxed{\text{ }}", None),
    ("\\boxed{\u200b}", None),
    (r"\boxed{5", None),
    (r"\boxed{\}", None),
    (r"\boxedx{5}", None),
    ("boxed{5}", None),
    ("boxed 5", None),
    ("Answer: 34", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), ANSWERS)
def test_answer_is_in_the_last_complete_box(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_deep_and_long_texts_take_linear_time() -> None:
    for text in (
        "\\boxed{" * 150_000,
        "{" * 1_000_000,
        "\\boxed" + " " * 1_000_000,
        "}" * 1_000_000,
    ):
        assert extract_answer(text) is None
        assert score("format", text).value == 0
    assert score("step", "\n" * 1_000_000 + "\t " * 100_000).value == 0
    assert score("repetition", "\n" * 1_000_000).value == 0


GOOD = r"<think>a</think><answer>\boxed{1}</answer>"
# (response, format, strict_format)
SHAPES = [
    (GOOD, 1, 1),
    ("<think>a\nb</think>\n <answer>So\n$\\boxed{\\frac{1}{2}}$.\n</answer>", 1, 1),
    (r"<think></think><answer>\boxed{1}</answer>", 0, -1),
    ("<think> \n\u200b</think><answer>\\boxed{1}</answer>", 0, -1),
    ("<think>\u6211</think><answer>\\boxed{\u2205}</answer>", 1, 1),
    (r"<think>a</think><answer>\boxed{\{\}}</answer>", 1, 1),
    (r"<think>a</think><answer>\boxed{\pi}</answer>", 1, 1),
    (r"<think>a</think><answer>\boxed{\color{red}{5}}</answer>", 1, 1),
    (r"<think>a</think><answer>\boxed{\,}</answer>", 0, -1),
    ("<think>a</think><answer>\\boxed{\u200b}</answer>", 0, -1),
    (r"<think>a</think><answer>\boxed{&nbsp;}</answer>", 0, -1),
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
    (r"<think>a</think><answer>\boxed 1</answer>", 0, -1),
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
    assert score("format", response) == Score(plain, Outcome.RIGHT if plain == 1 else Outcome.WRONG)
    outcome = Outcome.RIGHT if strict == 1 else Outcome.WRONG
    assert score("strict_format", response) == Score(strict, outcome)


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
    assert score("reasoning_steps", response).value == pytest.approx(thirds / 3)
    assert score("step", response) == score("reasoning_steps", response)


def test_accuracy_values_are_settable() -> None:
    responses = [r"\boxed{34}", r"\boxed{35}", "the answer is 34"]

    def given(name: str, **settings: object) -> list[float]:
        return [score(name, each, "34", **settings).value for each in responses]

    assert given("acc") == [1, -1, -1]
    assert given("acc", wrong=-0.5) == [1, -0.5, -1]  # the three levels of the old code
    assert given("acc", right=2, wrong=0, missing=-3) == [2, 0, -3]
    assert given("base_acc", wrong=-0.5) == [1, 0, 0]
    outcomes = [score("acc", each, "34").outcome for each in responses]
    assert outcomes == [Outcome.RIGHT, Outcome.WRONG, Outcome.NO_ANSWER]
    assert load_function("acc", {"acc": {"wrong": -0.5}}).declared.failed == -0.5


QUESTION = (
    r"Evaluate $16\left(\frac{125}{2}+\frac{25}{4}+\frac{9}{16}+1\right)$, where $x=5$, "
    "36 inches are 3 feet, 0.5 is given, the options are (A) 10 (B) 12, and of 2, 3 and 4 "
    "two are prime."
)
# (right answer, box, whether it is a copy)
COPIES = [
    ("1125", r"16\left(\frac{125}{2}+\frac{25}{4}+\frac{9}{16}+1\right)", True),
    ("1125", r"16 ( \dfrac{125}{2} + \dfrac{25}{4} + \dfrac{9}{16} + 1 )", True),
    ("1125", r"x = \left(16(\frac{125}2+\frac{25}4+\frac9{16}+1)\right)", True),
    (r"3\text{ ft}", r"36\text{ inches}", True),
    (r"\frac{1}{2}", "0.5", True),
    ("1125", "1125", False),
    ("1125", r"16(\frac{125}{2}+\frac{25}{4}+\frac{9}{16}+1) = 1125", False),
    ("1125", r"16 \cdot \frac{1125}{16}", False),
    ("5", "5", False),
    ("5", "x=5", False),
    ("5", r"\boxed{5}", False),
    ("5", "5.0", False),
    ("16", "16", False),
    ("B", "(B) 12", False),
    ("(B) 12", "12", False),
    ("3, 2", "2, 3", False),
    (r"\frac{9}{16}", "9/16", False),
    (r"3\text{ ft}", "3 feet", False),
    ("0.50", "0.5", False),
]


@pytest.mark.parametrize(("gold", "box", "copy"), COPIES)
def test_span_of_the_question_is_no_answer_unless_it_is_the_right_ones_own_text(
    gold: str, box: str, copy: bool
) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>"
    made = RewardInput(prompt, rf"\boxed{{{box}}}", gold, tokens=9, limit=100, truncated=False)
    elsewhere = replace(made, prompt="What is it?")
    expected = Score(-1.0, Outcome.COPIED) if copy else Score(1.0, Outcome.RIGHT)
    right = Score(1.0, Outcome.RIGHT)
    assert scores("acc", [made, elsewhere]) == [expected, right]
    assert scores("acc", [made], copied_span="right") == [right]
    assert scores("base_acc", [made], copied_span="right") == [right]
    [base] = scores("base_acc", [made])
    assert base == (Score(0.0, Outcome.COPIED) if copy else right)


TRICKS = [
    json.loads(line)
    for line in (Path(__file__).parent / "reward_tricks.jsonl").read_text("ascii").splitlines()
]


def test_tricks_of_a_model_that_games_its_reward_earn_nothing() -> None:
    """A row: a question, its right answer, a response, and the trick it tries, "" for an honest
    one."""
    honest, paid = [], []
    for row in TRICKS:
        case = RewardInput(row["question"], row["response"], row["gold"], 9, 100, truncated=False)
        [found] = scores(row["scorer"], [case])
        (paid if row["trick"] else honest).append((found.outcome is Outcome.RIGHT, row))
    assert [row for right, row in paid if right] == []
    assert [row for right, row in honest if not right] == []
    assert len(paid) >= 800 and len({row["question"] for _, row in honest}) == len(honest) >= 20


def test_length_prefers_the_shorter_of_a_group() -> None:
    members = [(10, True), (30, True), (50, True), (10, False), (50, False)]
    group = [case(tokens=n, right=right) for n, right in members]
    assert values("length", group) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert values("length", [case(tokens=7, right=True)] * 3) == [0.0] * 3


def test_cosine_goes_from_short_to_long_by_verdict() -> None:
    group = [case(tokens=n, right=right) for right in (True, False) for n in (0, 25, 50, 99, 100)]
    quarter, last = (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(math.pi * 0.99)) / 2
    expected = [2, 1 + quarter, 1.5, 1 + last, -10, -10, -10 * quarter, -5, -10 * last, -10]
    assert values("cosine", group) == pytest.approx(expected)
    other = {"right_short": 1, "right_long": 0.5, "exceeded": -1}
    assert values("cosine", group[:5:4], **other) == [1, -1]


def test_overlong_punishes_the_last_tokens_linearly() -> None:
    group = [case(tokens=n) for n in (1, 80, 81, 90, 100, 101)]
    assert values("overlong", group) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    other = values("overlong", group, cache_tokens=40)
    assert other == pytest.approx([0, -0.5, -0.525, -0.75, -1, -1])
    dapo = [case(tokens=n, limit=20480) for n in (16384, 18432, 20480)]
    assert values("overlong", dapo) == pytest.approx([0, -0.5, -1])


def test_language_consistency_is_the_share_of_words_of_one_language() -> None:
    mixed = "<think>So \\frac{x}{2} is two \u4e24</think><answer>\u662f\u662f</answer>"
    assert values("language_consistency", [case(mixed)]) == [pytest.approx(3 / 4)]
    assert values("language_consistency", [case(mixed)], language="zh") == [pytest.approx(1 / 4)]
    assert values("language_consistency", [case("x + 2 = \\pi"), case("")]) == [0.0, 0.0]


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    assert values("repetition", [case("a b c d e")], ngram=3) == [0]
    # abc bca cab abc
    assert values("repetition", [case("a b c a b c")], ngram=3) == pytest.approx([-1 / 4])
    assert values("repetition", [case("x " * 102)], ngram=3) == pytest.approx([-0.99])
    assert values("repetition", [case("a b")], ngram=3) == [0]
    chinese = case("\u6211\u4eec" * 3)  # no spaces
    assert values("repetition", [chinese], ngram=3) == pytest.approx([-1 / 2])
    assert values("repetition", [case("so " * 39), case("so " * 41)]) == pytest.approx([0, -1 / 2])


def test_names_are_checked_with_the_way_out() -> None:
    assert check_names(["acc", "format", "length", "overlong", "step"]) == []
    assert check_names(["acurracy"])[0].startswith(
        "algorithm.verifier_function: acurracy is not one of acc"
    )
    assert "did you mean format?" in check_names(["fromat"])[0]
    assert "each once" in check_names(["acc", "acc"])[0] and "at least one" in check_names([])[0]
    assert list(choose(["base_acc", "cosine", "step"], {})) == ["base_acc", "cosine", "step"]
    for names, sentence in (
        (["format", "cosine"], "cosine depends on which responses are right: name acc, too"),
        (["acurracy"], "acurracy is not one of"),
    ):
        with pytest.raises(BadInput, match=sentence):
            choose(names, {})


# -- functions of one's own ---

MODULE = """
import numpy
from r1zero.reward.functions import reward_function
from r1zero.types import Outcome, Score
def ends(cases): return [float(case.response.endswith(case.gold)) for case in cases]
def array(cases): return numpy.ones(len(cases), numpy.float32)
def short(cases): return [1.0]
def nan(cases): return [float("nan")] * len(cases)
def text(cases): return ["1"] * len(cases)
def nothing(cases): pass
def plain(cases, *, word="so", times=1): return [case.response.count(word) * times for case in cases]
@reward_function(scope="sample", columns=("level", "meta.kind"), failed="least")
def hard(case, *, bonus: float = 0.5, least: float = -1.0):
    return bonus * case.row["level"] + (case.row["meta.kind"] == "algebra")
@reward_function(scope="sample", gives_verdict=True)
def exact(case):
    return Score(1, Outcome.RIGHT) if case.response == case.gold else Score(0, Outcome.WRONG)
NUMBER = 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with reward functions; its path. It is importable as mine.scorers, too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scorers.py").write_text(MODULE)
    (tmp_path / "mine" / "broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "mine" / "leaves.py").write_text("raise SystemExit(4)\n")
    (tmp_path / "mine" / "ends.py").write_text("import os; os._exit(4)\n")
    (tmp_path / "mine" / "odd.py").write_text(
        "from r1zero.reward.functions import reward_function\n"
        "@reward_function(columns='level')\ndef score(cases): return [0.0] * len(cases)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return str(tmp_path / "mine" / "scorers.py")


def test_custom_function_by_module_and_by_file(module: str) -> None:
    cases = [case("it is 5", "5"), case("it is 6", "5")]
    for name in ("mine.scorers:ends", f"{module}:ends"):
        [(shown, chosen)] = choose([name], {}).items()
        assert shown == "scorers.ends" and chosen.declared.after_verdicts
        assert scores(name, cases) == [Score(1.0, Outcome.GRADED), Score(0.0, Outcome.GRADED)]
    assert values("mine.scorers:array", cases) == [1.0, 1.0]
    assert all(type(value) is float for value in values("mine.scorers:array", cases))


def test_custom_function_takes_settings_and_the_columns_it_declares(module: str) -> None:
    of_data = replace(case("4"), row={"level": 3, "meta.kind": "algebra"})
    function = load_function("mine.scorers:hard", {"hard": {"bonus": "2e-1"}})
    assert function.score([of_data]) == [Score(pytest.approx(1.6), Outcome.GRADED)]
    chosen = choose(["mine.scorers:hard"], {"hard": {"least": -3}})["scorers.hard"]
    assert chosen.declared.columns == ("level", "meta.kind")
    assert not chosen.declared.after_verdicts and chosen.declared.failed == -3
    plain = load_function("mine.scorers:plain", {"plain": {"times": 2.0}})
    assert [each.value for each in plain.score([case("so so")])] == [4.0]


def test_custom_function_may_give_the_verdict(module: str) -> None:
    chosen = choose(["mine.scorers:exact", "length"], {})
    assert chosen["scorers.exact"].declared.gives_verdict
    assert scores("mine.scorers:exact", [case("5", "5")]) == [Score(1.0, Outcome.RIGHT)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hard": {"bonas": 1}}, "reward.settings.hard.bonas is unknown; did you mean bonus?"),
        ({"hard": {"bonus": "much"}}, "reward.settings.hard.bonus: 'much' must be a number"),
        ({"plain": {"times": 1.5}}, "reward.settings.plain.times: 1.5 must be a whole number"),
        ({"plain": {"word": [1]}}, "reward.settings.plain.word: [1] must be a text"),
        ({"hart": {"bonus": 1}}, "reward.settings.hart is no reward function; did you mean hard?"),
        ({"cosine": {"exceded": 1}}, "reward.settings.cosine.exceded is unknown"),
    ],
)
def test_settings_that_do_not_fit_are_told_with_their_key(
    module: str, settings: dict[str, dict[str, object]], sentence: str
) -> None:
    names = ["mine.scorers:hard", "mine.scorers:plain", "acc", "cosine"]
    with pytest.raises(BadInput, match=re.escape(sentence)):
        choose(names, settings)


def test_settings_of_which_none_is_given_are_the_defaults_of_the_annotated_ones() -> None:
    """The short way of a configuration beside the one that reads annotations."""
    for name in REWARD_FUNCTIONS.names():
        function = REWARD_FUNCTIONS[name].function
        notes = Diagnostics()
        assert default_settings(function) == read_settings(function, {}, name, notes)
        assert not notes.problems


def test_settings_that_two_functions_could_mean_are_refused(module: str) -> None:
    (Path(module).parent / "other.py").write_text("def hard(cases): return [0.0] * len(cases)\n")
    with pytest.raises(BadInput, match="reward.settings.hard could mean several of"):
        choose(["mine.scorers:hard", "mine.other:hard"], {"hard": {"bonus": 1}})


@pytest.mark.parametrize(
    ("function", "kind", "sentence"),
    [
        ("short", ValueError, "returned 1 values for 2 responses"),
        ("nan", ValueError, "returned nan for response 0"),
        ("text", TypeError, "returned '1' for response 0, which is no number"),
        ("nothing", TypeError, "returned a NoneType, not a list of 2 numbers"),
    ],
)
def test_bad_return_values_are_named(
    module: str, function: str, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=re.escape(f"mine.scorers:{function} {sentence}")):
        scores(f"mine.scorers:{function}", [case(), case()])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "mine.nowhere:score",
            "cannot be loaded: ModuleNotFoundError: No module named 'mine.nowhere'",
        ),
        (
            "mine.broken:score",
            "cannot be loaded: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("mine.leaves:score", "cannot be loaded: SystemExit: 4"),
        ("mine.ends:score", "cannot be loaded: the process that imports ended with status 4"),
        ("mine.odd:score", "columns: 'level' must be a tuple of names, such as (\"level\",)"),
        ("mine.scorers:end", "mine.scorers has no end; did you mean ends?"),
        ("mine.scorers:NUMBER", "NUMBER in mine.scorers is no function"),
    ],
)
def test_functions_that_cannot_be_loaded_are_named(module: str, name: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)) as caught:
        choose([name], {})
    assert str(caught.value).startswith(f"algorithm.verifier_function: {name}")


def test_names_that_cannot_be_custom_functions_are_named(module: str) -> None:
    assert "there is no file nowhere.py" in check_names(["nowhere.py:score"])[0]
    for name in ("mine.scorers:", ":ends", "mine/scorers:ends", "mine.scorers:a.b"):
        assert "names no function" in check_names([name])[0]
    assert "each once" in check_names(["mine.scorers:ends", f"{module}:ends"])[0]


def test_every_file_of_the_table_holds_the_function_of_its_name() -> None:
    for name in REWARD_FUNCTIONS.names():
        assert REWARD_FUNCTIONS[name].__name__ == name
