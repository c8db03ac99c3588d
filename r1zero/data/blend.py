"""Data blending: which data set the prompt at each position of the stream comes from.

`data_path` is one path, or a blend of weights and paths in turn, with commas or spaces between
them: `0.7,data/math,0.3,data/gsm8k.parquet`. Position n takes the data set that is furthest behind
its share of the n prompts before it, the first one among equals; Megatron blends in the same way.
The rule needs no random numbers: what is random, and keyed by the seed, is the order of the prompts
inside each data set.
"""

from __future__ import annotations

import os

from r1zero.data.preprocessed import is_preprocessed
from r1zero.errors import BadInput


def split_blend(text: str) -> list[tuple[float, str]]:
    """Return the weights, which add up to 1, and paths of a `data_path`. BadInput when it is
    malformed."""
    if not text.strip():
        raise BadInput(
            "it is empty; name a file, a prefix, or a blend such as 0.7,data/a,0.3,data/b"
        )
    if "," in text:
        words = [word.strip() for word in text.split(",")]
    else:
        words = text.split()
    if len(words) == 1 or os.path.exists(text) or is_preprocessed(text):
        return [(1.0, text)]
    if len(words) % 2:
        raise BadInput(
            f"{text!r} is neither a path nor weights and paths in turn, such as "
            "0.7,data/a,0.3,data/b"
        )
    weights = [_weight(word, path) for word, path in zip(words[::2], words[1::2], strict=True)]
    if sum(weights) == float("inf"):
        raise BadInput(
            f"the weights of {text!r} add up to infinity; write shares: 0.7,data/a,0.3,data/b"
        )
    return [
        (weight / sum(weights), path) for weight, path in zip(weights, words[1::2], strict=True)
    ]


def _weight(word: str, path: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise BadInput(
            f"the weight of {path or 'nothing'} is {word!r}; it must be a number above 0, in "
            "front of its path: 0.7,data/a,0.3,data/b"
        )
    if not path:
        raise BadInput(f"no path follows the weight {word}; write 0.7,data/a,0.3,data/b")
    return weight


class Blend:
    """The endless sequence of (data set, how many of it came before)."""

    def __init__(self, shares: list[float]) -> None:
        """Blend data sets in these `shares`, which add up to 1."""
        self._shares = shares
        self._counts = [0] * len(shares)
        self._drawn: list[tuple[int, int]] = []

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Return the data set of a position of the stream, and its number there."""
        while len(self._drawn) <= position:
            at = max(1, len(self._drawn))
            behind = [
                share * at - count for share, count in zip(self._shares, self._counts, strict=True)
            ]
            chosen = behind.index(max(behind))
            self._drawn.append((chosen, self._counts[chosen]))
            self._counts[chosen] += 1
        return self._drawn[position]
