"""The vocabulary of a tokenizer: which ids tokens have, and which texts are one token.

tokenizer.json is read as it stands, by the library that defines its format; classes of transformers
take parts of it and put rules of their own in the place of others. Needs neither torch nor
transformers.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from r1zero.config.parse import read_json
from r1zero.errors import BadInput

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Vocabulary:
    """The tokens of a tokenizer, added ones included."""

    def __init__(self, backend: Tokenizer, end_of_text: str | None) -> None:
        self.backend = backend
        if end_of_text is None:
            self.end_of_text = None
        else:
            self.end_of_text = backend.token_to_id(end_of_text)

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary | None:
        """Read the tokenizer.json of a folder; None when it has none. BadInput when it cannot be
        read."""
        if not (folder / TOKENIZER).is_file():
            return None
        return cls(read_backend(folder), named_tokens(folder).get("eos_token"))

    @cached_property
    def ids(self) -> frozenset[int]:
        """The ids that stand for a token."""
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids, default=-1) + 1

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether every token of this vocabulary has the same id in the other."""
        theirs = other.backend.get_vocab(with_added_tokens=True)
        ours = self.backend.get_vocab(with_added_tokens=True)
        return all(theirs.get(token) == number for token, number in ours.items())

    def refuse_beyond(self, rows: int) -> None:
        """BadInput when a token has no row in a model of so many."""
        if self.size > rows:
            raise BadInput(
                f"the tokenizer has ids up to {self.size - 1}, but the model's embedding has "
                f"{rows} rows; give the model's own tokenizer, or take out the tokens that were "
                "added"
            )

    def unused(self, rows: int) -> tuple[range, ...]:
        """Return the ids below `rows`, those of a model, that stand for no token, as ranges in
        order.

        BadInput when a token lies beyond the rows.
        """
        self.refuse_beyond(rows)
        known = np.zeros(rows + 2, bool)
        known[0] = known[-1] = True  # so that every range begins and ends between two entries
        known[np.fromiter(self.ids, np.int64, len(self.ids)) + 1] = True
        edges = np.flatnonzero(np.diff(known)).tolist()
        return tuple(
            range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)
        )

    def split(self, text: str) -> list[str]:
        """Return the tokens that a text is read as, as the tokenizer spells them."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def single(self, text: str) -> int | None:
        """Return the id of the one token that a text is read as; None when it is several, or
        unknown."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        is_one = len(ids) == 1 and self.text(ids[0]) == text
        if is_one:
            return ids[0]
        return None

    def text(self, number: int) -> str:
        """Return what an id stands for."""
        return self.backend.decode([number], skip_special_tokens=False)

    @property
    def special(self) -> list[str]:
        """The special tokens, in the order of their ids: no reward and no answer sees them."""
        added = self.backend.get_added_tokens_decoder()
        return [added[number].content for number in sorted(added) if added[number].special]


def read_backend(folder: Path) -> Tokenizer:
    """Read the tokenizer.json of a folder as it stands, but for cutting and padding, which no text
    gets here.

    Tokens that only the files beside it list are added under the ids that they have there. BadInput
    when the file cannot be read, or when such a token cannot have its id.
    """
    path = folder / TOKENIZER
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:
        # tokenizers raises the bare class, and no other, for every file that it cannot read
        if type(error) is not Exception:  # a fault of another kind is not the file's
            raise
        raise BadInput(
            f"{path} is no tokenizer that the library tokenizers can read ({error}); copy it again"
        ) from None
    for token in read_json(path).get("added_tokens") or []:
        number = backend.token_to_id(token["content"])
        # the library counts them on from the others, whatever the file says
        if number != token["id"]:
            raise BadInput(
                f"{path} gives the token {token['content']!r} the id {token['id']}, but the "
                f"library tokenizers gives it {number}; put the token into the model's vocab, "
                "too, or save the tokenizer anew"
            )
    backend.no_truncation()
    backend.no_padding()
    for number, token in sorted(_listed_tokens(folder).items()):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != number:
                raise BadInput(
                    f"{folder}: the token {token.content!r} with the id {number} is not in "
                    f"{TOKENIZER} and cannot be added to it; save the tokenizer anew"
                )
    return backend


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of the tokens that a folder gives a role, such as eos_token. BadInput for
    bad files."""
    found: dict[str, str] = {}
    for name in (SPECIAL_MAP, CONFIG):  # the second rules
        entries = _object(folder / name)
        for role in NAMES:
            if (token := _content(entries.get(role))) is not None:
                found[role] = token
    return found


def _listed_tokens(folder: Path) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json or the older added_tokens.json lists, by id."""
    found = {}
    for text, number in _object(folder / "added_tokens.json").items():
        found[int(number)] = AddedToken(text, normalized=False)
    for number, token in (_object(folder / CONFIG).get("added_tokens_decoder") or {}).items():
        found[int(number)] = AddedToken(**token)
    return found


def _content(token: Any) -> str | None:
    """The text of a token, which may be written with its properties."""
    if isinstance(token, dict):
        return token.get("content")
    return token


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object; copy it again")
    return content
