"""Vocabulary padding: rows of the output layer that belong to no token get probability 0.

A model has more rows than its tokenizer has tokens: padding for the hardware, or holes. Nothing
trained them, and what is drawn from them has no text that a reward, a sample or a person could see.
Each forward pass overwrites their few logits. The product that makes the logits keeps all rows,
whose number suits the hardware, and no other pass over the logits is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# e^(LOWEST - any logit) is exactly 0 in fp32, and so is 0 * LOWEST, which an entropy needs: 0 *
# -inf is none.
LOWEST = -1e30


def local_columns(unused: Sequence[range], first: int, rows: int) -> tuple[slice, ...]:
    """Return where ids of `unused` lie in the logits of the rows [first, first + rows)."""
    found = []
    for ids in unused:
        start = max(ids.start, first)
        stop = min(ids.stop, first + rows)
        if start < stop:
            found.append(slice(start - first, stop - first))
    return tuple(found)


def blank(logits: torch.Tensor, columns: Sequence[slice]) -> torch.Tensor:
    """Take the probability of these columns away, in place. logits [..., rows]; returns them."""
    for part in columns:
        logits[..., part] = LOWEST
    return logits
