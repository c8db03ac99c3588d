"""The endless stream of prompts: problems of a file, rendered, tokenised, shuffled by epoch.

What is at a position of the stream follows from the file, the seed and the position alone, so a run resumes
by asking for the next position. Also here: the model's tokenizer and the ids that end a response.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1zero.batch import Prompt
from r1zero.data.problems import parse_json, read_problems
from r1zero.data.template import Template

_CHUNK = 1024  # texts tokenised in one call


class Prompts:
    """The problems of one file as a stream of prompts without end."""

    def __init__(self, path: str | Path, map_keys: dict[str, str], template: Template,
                 tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, seed: int,
                 shuffle: bool = True) -> None:
        """Read `path` and drop prompts of more than `max_prompt_length` tokens.

        ValueError when the file, a row or a column is bad, or no prompt is left.
        """
        problems = read_problems(path, map_keys)
        self.seed, self.shuffle = seed, shuffle
        self.prompts: list[Prompt] = []
        for first in range(0, len(problems), _CHUNK):
            chunk = problems[first:first + _CHUNK]
            texts = [template.render(problem.question, problem.system) for problem in chunk]
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            self.prompts += [Prompt(first + i, texts[i], np.asarray(ids[i], np.int32), chunk[i].answer)
                             for i in range(len(chunk)) if len(ids[i]) <= max_prompt_length]
        self.num_dropped = len(problems) - len(self.prompts)
        if not self.prompts:
            raise ValueError(f"{path}: all {len(problems)} prompts are longer than max_prompt_length="
                             f"{max_prompt_length} tokens; set a larger one")

    def __len__(self) -> int:
        """Return the number of prompts of an epoch."""
        return len(self.prompts)

    def draw(self, start: int, count: int) -> list[Prompt]:
        """Return the prompts at the positions [start, start + count) of the stream."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            epoch, slot = divmod(start + len(drawn), len(self))
            drawn += [self.prompts[i] for i in self._order(epoch)[slot:slot + count - len(drawn)]]
        return drawn

    def _order(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch, int64 [prompts]."""
        if not self.shuffle:
            return np.arange(len(self))
        # Sorting raw random bits: unlike Generator.permutation, they are the same in every release of numpy.
        bits = np.random.Philox(key=[self.seed, epoch]).random_raw(len(self))
        return np.argsort(bits, kind="stable")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local model folder. ValueError when it is missing or broken."""
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json or tokenizer_config.json; tokenizer_name_or_path "
                         "(default: load) must name a folder with the tokenizer files")
    for path in sorted(folder.glob("*token*.json")):
        parse_json(str(path), path.read_text(encoding="utf-8"))  # a cut-off file shall name itself
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from None


def end_of_text_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end a response, ascending, as the folder's JSON files and the tokenizer name them.

    ValueError when there is none.
    """
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            ids = parse_json(str(path), path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(ids) if isinstance(ids, list) else {ids}
    if found == {None}:
        raise ValueError(f"{folder} names no end of text; set eos_token_id in its generation_config.json")
    return tuple(sorted(found - {None}))
