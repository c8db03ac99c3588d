"""Prompt templates: the characters that the model reads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.reward.functions.format import full_format

INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think><answer> answer here </answer>Put your final answer within "
    + chr(92)
    + "boxed{}."
    + chr(10)
)


def write(folder: Path, entries: object) -> Path:
    path = folder / "templates.json"
    path.write_text(json.dumps(entries))
    return path


def test_qwen_r1_has_one_backslash_and_a_newline_before_the_question() -> None:
    newline = chr(10)
    assert Template("qwen_r1").render("What is 1+2?") == (
        "<|im_start|>system"
        + newline
        + "You are a helpful assistant.<|im_end|>"
        + newline
        + "<|im_start|>user"
        + newline
        + INSTRUCTION
        + "What is 1+2?<|im_end|>"
        + newline
        + "<|im_start|>assistant"
        + newline
    )


def test_system_text_of_the_data_takes_the_place_of_the_default() -> None:
    text = Template("qwen_r1").render("Q", "Be brief.")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text and "helpful" not in text
    assert Template("qwen_r1").render("Q", "") == Template("qwen_r1").render("Q", None)


def test_braces_and_places_inside_a_question_stay_as_they_are() -> None:
    question = r"Solve \frac{a}{b} with {system} and {question} and \1."
    assert Template("plain").render(question) == question
    assert question in Template("qwen_r1").render(question, "{question}")


def test_two_shot_chat_shows_two_answers_in_the_full_format_before_the_question() -> None:
    turns = Template("two_shot_chat").render("What is 1+2?").split("<|im_start|>assistant\n")
    answers = [turn.split("<|im_end|>")[0] for turn in turns[1:-1]]
    assert len(answers) == 2 and all(map(full_format, answers))
    assert turns[-1] == "" and "\nWhat is 1+2?\n" in turns[-2]


def test_a_system_text_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(BadInput, match="'plain' has no {system}.*map_keys.system"):
        Template("plain").render("Q", "Be brief.")


def test_unknown_template_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadInput, match="'qwen-r1' is not in .*nearest are qwen_r1"):
        Template("qwen-r1")


def test_own_templates_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"mine": {"text": ["Q: ", "{question}\n", "A: {x}"]}})
    assert Template("mine", path).render("1+1?") == "Q: 1+1?\nA: {x}"


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"text": ["no place"]}, "must hold {question} exactly once"),
        ({"text": ["{question} {question}"]}, "must hold {question} exactly once"),
        ({"text": "{question}"}, "must have"),
        ({"text": ["{question}"], "sytem": "x"}, "must have"),
        ({"text": ["{system} {question}"]}, "needs {system}"),
        ({"text": ["{question}"], "system": "x"}, "needs {system}"),
        ("{question}", "must have"),
    ],
)
def test_malformed_entry_is_refused(tmp_path: Path, entry: object, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        Template("mine", write(tmp_path, {"mine": entry}))


def test_broken_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read as a JSON file"):
        Template("mine", tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"mine": {')
    with pytest.raises(BadInput, match="cut.json cannot be read"):
        Template("mine", tmp_path / "cut.json")
    with pytest.raises(BadInput, match="must hold a JSON object"):
        Template("mine", write(tmp_path, ["mine"]))
