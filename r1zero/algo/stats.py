"""Statistics of an update (metrics of the loss): name, reduction and chart of each.

A loss declares its own statistics; those that every loss has stand here. Policy, metrics,
invariants and the report read the declarations, so a new statistic is written down once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1zero.types import Reduce


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """One statistic: a value for each response token, and what becomes of all these values."""

    key: str  # in metrics.jsonl
    reduce: Reduce
    title: str  # of the chart; statistics that follow one another with the same title share it
    label: str  # of the line in it
    unit: str = "plain"  # plain, share, or another kind of number that the report's charts know
    unit_name: str = ""  # written at the axis, such as nats
    note: str = ""  # below the title
    starts_at_zero: bool = True  # the axis
    log_scale: bool = False
    first_update: bool = False  # measured in the first update of a step only

    def as_json(self) -> dict[str, Any]:
        """The chart's line, as the report's scripts take it."""
        return {
            "key": self.key,
            "title": self.title,
            "label": self.label,
            "kind": self.unit,
            "unit": self.unit_name,
            "note": self.note,
            "zero": self.starts_at_zero,
            "log": self.log_scale,
        }


KL = Stat(
    key="kl",
    reduce=Reduce.TOKEN_MEAN,
    title="KL to the reference",
    label="KL",
    unit_name="nats",
    note="Per token, over the response. A sudden climb means the policy has left its start.",
)
ENTROPY = Stat(
    key="entropy",
    reduce=Reduce.TOKEN_MEAN,
    title="Entropy",
    label="entropy",
    unit_name="nats",
    note="Per token. Near zero the samples of a group are all alike and learning stops.",
)
MISMATCH = Stat(
    key="mismatch/mean",
    reduce=Reduce.TOKEN_MEAN,
    title="Mismatch",
    label="mean",
    unit_name="nats",
    note="Trainer against rollout engine, log-prob of the same token. bf16: a few 1e-2 on average.",
    starts_at_zero=False,
    log_scale=True,
)
MISMATCH_MAX = Stat(
    key="mismatch/max",
    reduce=Reduce.MAX,
    title="Mismatch",
    label="max",
    unit_name="nats",
    note=MISMATCH.note,
    starts_at_zero=False,
    log_scale=True,
)
MISMATCH_KL = Stat(
    key="mismatch/kl",
    reduce=Reduce.TOKEN_MEAN,
    title="Mismatch",
    label="KL",
    unit_name="nats",
    note=MISMATCH.note,
    starts_at_zero=False,
    log_scale=True,
)
MISMATCH_OF_SEQUENCES = Stat(
    key="mismatch/sequence",
    reduce=Reduce.SEQUENCE_MEAN,
    title="Mismatch",
    label="mean of a response",
    unit_name="nats",
    note=MISMATCH.note,
    starts_at_zero=False,
    log_scale=True,
)
ROUTER_AGREEMENT = Stat(
    key="mismatch/router_agreement",
    reduce=Reduce.TOKEN_MEAN,
    title="Routers that agree",
    label="tokens and layers",
    unit="share",
    note="Where routes are replayed: the trainer's router would have chosen the experts of the engine's.",
    starts_at_zero=False,
)
FIRST_DRIFT = Stat(
    key="ratio/first_drift",
    reduce=Reduce.TOKEN_MEAN,
    title="Ratio of the first update",
    label="distance from 1",
    note="|p / p_old - 1| before the weights have moved: 0 but for rounding.",
    first_update=True,
)
IMPORTANCE_RATIO = Stat(
    key="importance/ratio",
    reduce=Reduce.TOKEN_MEAN,
    title="Importance weights",
    label="p_old / p of the engine",
    note="What algorithm.correction weighs tokens by, before and after its bounds. Near 1.",
    starts_at_zero=False,
)
IMPORTANCE = Stat(
    key="importance/mean",
    reduce=Reduce.TOKEN_MEAN,
    title="Importance weights",
    label="weight",
    note=IMPORTANCE_RATIO.note,
    starts_at_zero=False,
)
TRUNCATED = Stat(
    key="importance/truncated",
    reduce=Reduce.TOKEN_MEAN,
    title="Bounded importance weights",
    label="tokens cut off or masked",
    unit="share",
    note="Tokens whose weight was bounded or set to 0, and responses without policy loss.",
)
REJECTED = Stat(
    key="importance/rejected",
    reduce=Reduce.SEQUENCE_MEAN,
    title="Bounded importance weights",
    label="responses rejected",
    unit="share",
    note=TRUNCATED.note,
)
KL_COEFFICIENT = Stat(
    key="kl_coefficient",
    reduce=Reduce.MAX,
    title="KL coefficient",
    label="coefficient",
    note="As algorithm.kl_ctrl steers it.",
)
ENTROPY_COEFFICIENT = Stat(
    key="entropy_coefficient",
    reduce=Reduce.MAX,
    title="Entropy coefficient",
    label="coefficient",
    note="As algorithm.entropy_ctrl steers it; 0 while the entropy is above its target.",
)
LOSS = Stat(
    key="loss",
    reduce=Reduce.TOKEN_MEAN,
    title="Loss",
    label="loss",
    note="Policy, KL and entropy terms together, as a mean over tokens. Its level means little.",
    starts_at_zero=False,
)

BEFORE_OWN = (KL, ENTROPY)
OF_MODEL = (ROUTER_AGREEMENT,)  # counted where the model runs, and not by the loss
OF_MISMATCH = (MISMATCH, MISMATCH_MAX, MISMATCH_KL, MISMATCH_OF_SEQUENCES, IMPORTANCE_RATIO)
OF_CORRECTION = (IMPORTANCE, TRUNCATED, REJECTED)
AFTER_OWN = (
    *OF_MISMATCH,
    *OF_CORRECTION,
    FIRST_DRIFT,
    KL_COEFFICIENT,
    ENTROPY_COEFFICIENT,
    LOSS,
)


def all_stats(own: tuple[Stat, ...]) -> tuple[Stat, ...]:
    """Return the statistics of a loss that declares `own`, in the order of their charts."""
    stats = (*BEFORE_OWN, *own, *AFTER_OWN)
    keys = [stat.key for stat in stats]
    assert len(set(keys)) == len(keys), f"a statistic is declared twice: {keys}"
    return stats
