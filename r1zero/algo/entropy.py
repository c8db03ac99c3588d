"""The coefficient of the entropy bonus: fixed, or steered to hold the entropy at a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EntropyCoefficient:
    """Adaptive entropy control (Skywork-OR1, arXiv:2505.22312): one more step of the coefficient for
    each step of training whose entropy was at most the target, one less for each above it.

    The bonus holds only while the entropy is at most the target: it keeps entropy from falling, and
    never drives it up.
    """

    value: float  # remembered, also while it does not apply
    target: float | None = None  # nats a token; None: fixed
    step: float = 0.0
    most: float = 0.0
    applies: bool = True

    @property
    def applied(self) -> float:
        """Weight of the bonus in the loss."""
        return self.value if self.applies else 0.0

    @property
    def kept(self) -> float | None:
        """What a checkpoint keeps: None if it is fixed, as the configuration then says it."""
        return None if self.target is None else self.value

    def update(self, measured: float) -> None:
        """Move by one step after a step of training with this mean entropy per token, in nats."""
        if self.target is None:
            return
        self.applies = measured <= self.target
        moved = self.value + (self.step if self.applies else -self.step)
        self.value = min(max(moved, 0.0), self.most)

    def restore(self, value: float | None, applies: bool) -> None:
        """Go on from a checkpoint; None: it is older than this, or it was fixed there."""
        if self.target is None or value is None:
            return
        self.value = min(value, self.most)
        self.applies = applies
