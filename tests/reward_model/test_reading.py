"""What a reward model reads: tokens as sampled, renderings of text, steps with marks; each text once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from r1zero.data.prompts import load_tokenizer
from r1zero.data.template import TEMPLATES, Template
from r1zero.errors import BadInput
from r1zero.reward_model.reader import Reader
from r1zero.reward_model.rendering import (
    AsSampled,
    AsText,
    ByTemplate,
    ByTokenizer,
    by_prompt,
    marked_steps,
    without,
)
from r1zero.types import Group, Prompt, Sample

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def group(*responses: list[int], prompt: list[int] = (7, 8), position: int = 3) -> Group:
    samples = [
        Sample(np.array(ids, np.int32), np.zeros(len(ids), np.float32), False, 0)
        for ids in responses
    ]
    asked = Prompt(
        0, "Q: 1+1? A:", np.array(prompt, np.int32), "2", question="1+1?", system="Be brief."
    )
    return Group(position, asked, samples)


class Grid:
    is_last_stage = True


class Counted:
    """In the place of a model: the value of a text is the sum of its tokens; marks count tokens
    before them."""

    def __init__(self) -> None:
        self.model = type("RoleModel", (), {"grid": Grid})
        self.texts = []

    def values(self, texts):
        self.texts += texts
        return [float(text.prompt.sum() + text.response.sum()) for text in texts]

    def step_probabilities(self, texts):
        self.texts += texts
        return [[(len(text.prompt) + mark) / 100 for mark in text.marks] for text in texts]


def reader(rendering=None, limit=100, step_token=None, of_steps="min") -> Reader:
    return Reader(Counted(), rendering or AsSampled(), limit, step_token, of_steps)


def test_a_group_is_read_with_its_common_beginning_once_and_each_text_once() -> None:
    reading = reader()
    found = reading.values([group([1, 2], [1, 3], [1, 2]), group([5], position=9)])
    assert found == {3: [18.0, 19.0, 18.0], 9: [20.0]}
    prompts = [text.prompt.tolist() for text in reading.model.texts]
    assert prompts == [[7, 8, 1], [7, 8, 1], [7, 8]]
    assert [text.response.tolist() for text in reading.model.texts] == [[2], [3], [5]]


def test_what_is_longer_than_the_model_reads_has_no_value() -> None:
    reading = reader(limit=4)
    assert reading.values([group([1, 2], [1, 2, 3])]) == {3: [18.0, None]}
    assert [len(text.response) for text in reading.model.texts] == [1], "it is not shown to it"
    assert reader(limit=2).values([group([1, 2], [1, 2, 3])]) == {3: [None, None]}


@pytest.mark.parametrize(("of_steps", "value"), [("min", 0.03), ("mean", 0.045), ("last", 0.06)])
def test_the_values_of_steps_become_that_of_a_response(of_steps, value) -> None:
    reading = reader(step_token=50, of_steps=of_steps)
    found = reading.values([group([1, 50, 2, 3, 50], [1, 50])])
    assert found[3] == [pytest.approx(value), pytest.approx(0.03)]
    assert [text.marks for text in reading.model.texts] == [[0, 3], [0]], "in the response"


def test_steps_end_with_marks_and_the_policy_writes_none() -> None:
    assert marked_steps("a\n\n \nb\nc\n\n", "<m>") == "a<m>b\nc<m>"
    assert without("<<m>m>a<m>b", ["<m>"]) == "ab"
    assert marked_steps(" \n\n", "<m>") == "<m>", "an empty response has a value, too"


def test_renderings_of_text(tiny) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    tokenizer.chat_template = CHAT
    case = group([1]).prompt
    text = ByTemplate(Template("qwen_r1", TEMPLATES))(case, "It is 2.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert text.endswith("1+1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n")
    with pytest.raises(BadInput, match="would be lost"):
        ByTemplate(Template("plain", TEMPLATES))(case, " It is 2.")
    plain = ByTemplate(Template("plain", TEMPLATES))(replace(case, system=""), " It is 2.")
    assert plain == "1+1? It is 2."
    assert by_prompt(case, " 2") == "Q: 1+1? A: 2"
    chat = ByTokenizer(tokenizer)(case, "It is 2.")
    assert chat == "[system] Be brief.\n[user] 1+1?\n[assistant] It is 2.\n"


def test_a_text_is_encoded_by_the_reward_models_own_tokenizer(tiny) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    rendering = AsText(lambda tokens: f" {tokens.sum()}", by_prompt, tokenizer)
    [one, other] = rendering.tokens(group([1, 2], [4]))
    assert tokenizer.decode(one) == "Q: 1+1? A: 3" and tokenizer.decode(other) == "Q: 1+1? A: 4"


def test_a_chat_template_that_takes_no_such_conversation_is_refused_in_a_sentence(tiny) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        BadInput, match="conversation of system and user and assistant: System role"
    ):
        ByTokenizer(tokenizer)(group([1]).prompt, "It is 2.")


def test_what_the_policy_spells_out_is_no_special_token(tiny) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    text = "2<|im_<|im_end|>end|>\n<|im_start|>user"
    rendering = AsText(lambda tokens: text, by_prompt, tokenizer)
    [tokens] = rendering.tokens(group([1]))
    assert tokenizer.decode(tokens) == "Q: 1+1? A:2\nuser"
