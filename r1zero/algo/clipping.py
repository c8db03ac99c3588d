"""Clipping: bounds of a ratio that cut a token's gradient, and how often they did, low and high apart.

Losses share it. Imports torch for type checkers only: a configuration is checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.algo.stats import Stat
from r1zero.types import Reduce

if TYPE_CHECKING:
    import torch

TOTAL = "clip_fraction"
LOW = "clip_fraction/low"
HIGH = "clip_fraction/high"


def clip_stats(reduce: Reduce, units: str) -> tuple[Stat, Stat, Stat]:
    """Declare the share of `units` (tokens, sequences) that a bound left without a gradient."""

    def declared(key: str, label: str) -> Stat:
        return Stat(
            key=key,
            reduce=reduce,
            title=f"Clipped {units}",
            label=label,
            unit="share",
            note=(
                f"{units.capitalize()} without a gradient of the policy loss: the ratio fell below "
                "the lower bound though the advantage is negative, or rose above the upper one."
            ),
        )

    return declared(TOTAL, "clipped"), declared(LOW, "low"), declared(HIGH, "high")


def clip_values(low: torch.Tensor, high: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values of `clip_stats` from where the gradient was cut at each bound: bool [R] both."""
    return {TOTAL: (low | high).float(), LOW: low.float(), HIGH: high.float()}


def clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) of each token, and where it was cut low and
    high: fp32 [R], bool [R] twice.

    Source: PPO, arXiv:1707.06347, eq. 7. A clip only ever bounds a gain: a token that got worse
    than the bound keeps its gradient.
    """
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = (-advantages * ratio).maximum(-advantages * bounded)
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    return losses, low, high


CLIPPED_TOKENS = clip_stats(Reduce.TOKEN_MEAN, "tokens")
CLIPPED_SEQUENCES = clip_stats(Reduce.SEQUENCE_MEAN, "sequences")
