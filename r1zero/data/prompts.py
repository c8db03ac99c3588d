"""The prompt data loader: problems rendered, tokenised, shuffled by epoch, blended, endless.

What is at a position of the stream follows from the data, the seed and the position alone, so a run
resumes by asking for the next position. Also here: the model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r1zero.data.blend import Blend
from r1zero.data.ends import refuse_split_ends
from r1zero.data.preprocessed import is_preprocessed, read_preprocessed
from r1zero.data.problems import parse_json, read_problems
from r1zero.data.sources import DataSource
from r1zero.data.template import Template
from r1zero.data.vocabulary import CONFIG, TOKENIZER, Vocabulary, named_tokens, read_backend
from r1zero.errors import BadInput
from r1zero.reward.math.gold import NO_ANSWERS, read_gold
from r1zero.types import Prompt

_CHUNK = 1024  # texts tokenised in one call
# Read by two libraries, and compared: digits, spaces, lines, letters of two forms, code, another
# script.
_PROBES = (
    "1234 + 56.78 = 1,290",
    ("  a\t b\n\n\n c \r\n"),
    "It's we'll DON'T",
    "caf\u00e9 cafe\u0301 \u212b",
    "def f(x):\n    return x**2  # \u03c0r\u00b2",
    "\u4f60\u597d\uff0c12\u4e2a\u3002",
    "\\boxed{\\frac{1}{2}}</answer>",
)


class Prompts:
    """The problems of data sets, blended by their shares, as a stream of prompts without end.

    `prompts` are those of one epoch of every data set in the order of the data; their indices go on
    from one data set to the next. Each epoch of a data set is another permutation; the blend says
    whose turn it is.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        templates: Mapping[str, Template],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Read the data sets, whose shares add up to 1, and drop prompts of more than
        `max_prompt_length` tokens. `templates` has those of all sets by name.

        BadInput when a file, a row or a column is bad, or no prompt is left.
        """
        self.seed = seed
        self.shuffle = shuffle
        self.prompts: list[Prompt] = []
        self.notes: list[str] = []  # what is to be said about the data
        self.num_rows = self.num_dropped = 0
        self.sets: list[tuple[DataSource, range]] = []  # the places of each set in `prompts`
        # of each data set, its epoch and permutation
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        parts = [part for source in sources for part in source.parts()]
        first = 0
        for source in parts:
            path = source.path
            template = templates[source.prompt_type]
            found = read_prompts(source, first, template, tokenizer)
            kept = [prompt for prompt in found.prompts if len(prompt.tokens) <= max_prompt_length]
            if not kept:
                raise BadInput(
                    f"{path}: all {len(found.prompts)} prompts are longer than "
                    f"max_prompt_length={max_prompt_length} tokens; set a larger one"
                )
            self.sets.append((source, range(len(self.prompts), len(self.prompts) + len(kept))))
            self.prompts += kept
            self.notes += found.notes
            self.num_rows += found.num_rows
            self.num_dropped += len(found.prompts) - len(kept)
            first = found.prompts[-1].index + 1
        self._blend = Blend([source.share for source in parts])

    def __len__(self) -> int:
        """Return the number of prompts of an epoch of every data set."""
        return len(self.prompts)

    def draw(self, start: int, count: int) -> list[Prompt]:
        """Return the prompts at the positions [start, start + count) of the stream."""
        return [self._prompt(*self._blend[position]) for position in range(start, start + count)]

    def find(self, indices: Sequence[int]) -> list[Prompt]:
        """Return the prompts with these indices, all of which were drawn before."""
        places = self._places
        return [self.prompts[places[index]] for index in indices]

    @property
    def indices(self) -> Set[int]:
        """Those of all prompts."""
        return self._places.keys()

    @cached_property
    def _places(self) -> dict[int, int]:
        """Where each prompt is in `prompts`, by its index."""
        return {prompt.index: place for place, prompt in enumerate(self.prompts)}

    def _prompt(self, data_set: int, number: int) -> Prompt:
        """Return the prompt that a data set gives when it is its turn for the `number`-th time,
        from 0."""
        _, places = self.sets[data_set]
        epoch, slot = divmod(number, len(places))
        if self._orders.get(data_set, (-1,))[0] != epoch:
            self._orders[data_set] = epoch, self._order(data_set, epoch)
        return self.prompts[places[self._orders[data_set][1][slot]]]

    def _order(self, data_set: int, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch, int64 [prompts of the data set]."""
        size = len(self.sets[data_set][1])
        if not self.shuffle:
            return np.arange(size)
        # Sorting raw random bits: unlike Generator.permutation, they are the same in every release
        # of numpy.
        bits = np.random.Philox(key=[self.seed, data_set << 32 | epoch]).random_raw(size)
        return np.argsort(bits, kind="stable")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one data set, how many rows it has, and what is to be said about them."""

    prompts: list[Prompt]
    num_rows: int
    notes: list[str]


def read_prompts(
    source: DataSource,
    first: int,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> PromptSet:
    """Read a raw data set, or what is tokenised under a prefix; indices count rows from `first`."""
    if is_preprocessed(source.path):
        source.layout.refuse_tokens(source.path)
        return _read_preprocessed(source, first, tokenizer)
    refuse_split_ends(template, vocabulary_of(tokenizer))
    found = read_problems(source.path, source.layout.fitting(template))
    numbers = [number for number, problem in enumerate(found.rows) if problem is not None]
    texts = [template.render(problem.question, problem.system) for problem in found.problems]
    rows = zip(numbers, found.problems, texts, tokenize(tokenizer, texts), strict=True)
    prompts = [
        Prompt(
            first + number,
            text,
            np.asarray(ids, np.int32),
            problem.answer,
            problem.row,
            source.label,
            category=source.category if problem.category is None else problem.category,
            question=problem.question,
            system=problem.system,
        )
        for number, problem, text, ids in rows
    ]
    return PromptSet(prompts, len(found.rows), found.notes)


def _read_preprocessed(
    source: DataSource, first: int, tokenizer: PreTrainedTokenizerBase
) -> PromptSet:
    path = source.path
    rows = list(read_preprocessed(path, vocabulary_of(tokenizer).size))
    texts = detokenize(tokenizer, [row.prompt for row in rows], special=True)
    golds = map(read_gold, detokenize(tokenizer, [row.answer for row in rows], special=False))
    prompts = [
        Prompt(
            first + row.index,
            text,
            row.prompt,
            gold,
            source=source.label,
            category=source.category,
        )
        for row, text, gold in zip(rows, texts, golds, strict=True)
        if gold.casefold() not in NO_ANSWERS
    ]
    left_out = len(rows) - len(prompts)
    if not prompts:
        raise BadInput(f"{path}: not one of its {left_out} problems has an answer to compare with")
    said = (
        f"{path}: {left_out} of {len(rows)} problems have no answer to compare with and are "
        "left out"
    )
    return PromptSet(prompts, len(rows), [said] if left_out else [])


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts as they stand: nothing is put in front or behind."""
    chunks = [texts[at : at + _CHUNK] for at in range(0, len(texts), _CHUNK)]
    result: list[list[int]] = []
    for chunk in chunks:
        for ids in tokenizer(chunk, add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]:
            result.append(ids)
    return result


def detokenize(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Sequence[int] | np.ndarray],
    special: bool,
) -> list[str]:
    """Return the texts of token ids; `special` tokens are written out or left out."""
    return tokenizer.batch_decode(
        [list(sequence) for sequence in sequences],
        skip_special_tokens=not special,
        clean_up_tokenization_spaces=False,
    )


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray, special: bool) -> str:
    """Return the text of the token ids [T]; `special` tokens are written out or left out."""
    text = tokenizer.decode(tokens, skip_special_tokens=not special)
    assert isinstance(text, str), "one sequence has one text"
    return text


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local model folder. BadInput when it is missing or broken.

    A tokenizer.json is what the model was trained with, and what other engines read. AutoTokenizer
    would choose a class by the names in the folder, and classes rebuild parts of it by rules of
    their own.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and not (folder / TOKENIZER).is_file():
        raise BadInput(
            f"{folder} has no {TOKENIZER} or {CONFIG}; tokenizer_name_or_path "
            "(default: load) must name a folder with the tokenizer files"
        )
    for path in sorted(folder.glob("*token*.json")):
        parse_json(str(path), path.read_text(encoding="utf-8"))  # a cut-off file shall name itself
    if (folder / TOKENIZER).is_file():
        return _wrapped(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the tokens of a loaded tokenizer."""
    return Vocabulary(tokenizer.backend_tokenizer, tokenizer.eos_token)


def _wrapped(folder: Path) -> PreTrainedTokenizerFast:
    """Give the tokenizer of a tokenizer.json the interface of transformers, and nothing else."""
    backend = read_backend(folder)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    # others would be added
    named = {role: text for role, text in named_tokens(folder).items() if text in added}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )
    for text in _PROBES:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert tokenize(tokenizer, [text]) == [expected], (
            f"transformers reads {text!r} as other tokens"
        )
    return tokenizer
