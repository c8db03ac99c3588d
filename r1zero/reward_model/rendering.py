"""What a reward model reads of a prompt and a response: their tokens, or its own rendering of them.

As sampled    the actor's tokens, where both models have the same tokenizer
Template      a template of the templates file, the response, and what closes its turn, as text,
              encoded by the reward model's tokenizer
Tokenizer     the same by the chat template that the tokenizer brings along

Of a process reward model the steps of a response, which blank lines part, each end with a mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from r1zero.data.prompts import tokenize
from r1zero.data.template import Template
from r1zero.errors import BadInput
from r1zero.types import Group, Prompt, Sample

STEPS = re.compile(r"\n\s*\n")  # between the steps of a response


class Rendering(Protocol):
    """Tokens for the reward model."""

    def tokens(self, group: Group) -> list[np.ndarray]:
        """What it reads of each sample of a group, int32 [tokens]."""


class AsSampled:
    """The tokens as they were sampled. The value is that of the response's last token."""

    def tokens(self, group: Group) -> list[np.ndarray]:
        """See Rendering."""
        prompt = group.prompt.tokens
        return [np.concatenate([prompt, sample.tokens]) for sample in group.samples]


@dataclass(frozen=True, slots=True)
class AsText:
    """The text, rendered and encoded anew. The value is that of the rendering's last token, whatever
    the template puts behind a response."""

    decode: Callable[[np.ndarray], str]  # of the actor's tokens, without special ones
    render: Callable[[Prompt, str], str]  # of a prompt and a response
    tokenizer: PreTrainedTokenizerBase  # of the reward model
    step_mark: str | None = None  # of a process reward model

    def tokens(self, group: Group) -> list[np.ndarray]:
        """See Rendering."""
        prompt = group.prompt
        if self.step_mark is not None:  # only steps of the response have marks
            marks = (self.step_mark,)
            prompt = replace(
                prompt,
                text=without(prompt.text, marks),
                question=without(prompt.question, marks),
                system=without(prompt.system, marks),
            )
        texts = [self.render(prompt, self._response(sample)) for sample in group.samples]
        return [np.asarray(ids, np.int32) for ids in tokenize(self.tokenizer, texts)]

    def _response(self, sample: Sample) -> str:
        """The response; what the policy spelled out of special tokens is no token of the rendering."""
        text = without(self.decode(sample.tokens), special_texts(self.tokenizer))
        if self.step_mark is None:
            return text
        return marked_steps(text, self.step_mark)


def marked_steps(text: str, mark: str) -> str:
    r"""A response whose every step ends with the mark.

    >>> marked_steps("1 + 1 = 2\n\nSo it is 2.\n", "<mark>")
    '1 + 1 = 2<mark>So it is 2.<mark>'
    """
    steps = [step.strip() for step in STEPS.split(text)]
    found = [step for step in steps if step]
    return "".join(f"{step}{mark}" for step in found or [""])


def without(text: str, pieces: Iterable[str]) -> str:
    """A text with none of these in it, not even one that taking out another puts together.

    >>> without("<m<mark>ark>a", ["<mark>"])
    'a'
    """
    found = [piece for piece in pieces if piece in text]
    while found:
        for piece in found:
            text = text.replace(piece, "")
        found = [piece for piece in found if piece in text]
    return text


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the special tokens of a tokenizer look like in a text that it reads."""
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special]


def by_prompt(prompt: Prompt, response: str) -> str:
    """The prompt as the actor's template made it, and the response behind it."""
    return prompt.text + response


@dataclass(frozen=True, slots=True)
class ByTemplate:
    """A template of the templates file."""

    template: Template

    def __call__(self, prompt: Prompt, response: str) -> str:
        return self.template.render(prompt.question, prompt.system) + response + self.template.close


@dataclass(frozen=True, slots=True)
class ByTokenizer:
    """The chat template of the reward model's tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prompt: Prompt, response: str) -> str:
        turns = [("user", prompt.question), ("assistant", response)]
        if prompt.system:
            turns.insert(0, ("system", prompt.system))
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:  # which templates raise for what they do not take
            named = " and ".join(role for role, _ in turns)
            raise BadInput(
                f"reward.prompt_type: the chat template of the reward model's tokenizer does not take a "
                f"conversation of {named}: {error}; name a template of the templates file"
            ) from None
        assert isinstance(text, str), "not tokenised"
        return text


def common_prefix(texts: Sequence[np.ndarray]) -> int:
    """How many tokens all texts begin with, at most all but the last one of the shortest.

    >>> common_prefix([np.array([5, 6, 7]), np.array([5, 6, 8, 9])])
    2
    """
    shortest = min(len(text) for text in texts) - 1
    same = np.ones(shortest, bool)
    for text in texts[1:]:
        same &= text[:shortest] == texts[0][:shortest]
    if same.all():
        return shortest
    return int(same.argmin())
