"""Item `tiny_job`: the tiny job trains, a second time the same, and the same when it is resumed.

Its invariants are looked at by the run itself, which ends where one does not hold. Determinism is
asked for: training.deterministic, and HCCL_DETERMINISTIC, which npu_check.py sets for this item.
"""

from __future__ import annotations

from pathlib import Path

from compare_metrics import differences, read_metrics

from npu_checks import jobs
from npu_checks.check import Check, CheckFailed, Figures

STEPS = 3
FIRST = 2  # steps of the run that goes on
COMPARED = ("prompt", "response", "reward", "truncated")
RANKS = 4  # 1 trains, 2 roll out, 1 is the reference
ADVICE = (
    "the device does not repeat itself, although it was asked to; training works all the same. Send "
    "us the JSON"
)


def run(check: Check) -> Figures:
    """Train three steps in one piece, and two steps and then the third."""
    jobs.make_tiny()
    ranks = RANKS if check.devices >= RANKS and not check.small else 1
    common = [
        "training.deterministic=true",
        "actor_rollout.lr_decay_style=constant",  # a linear one would depend on the number of steps
        f"training.save_interval={FIRST}",
    ]
    if check.small:
        common += jobs.SMALL
    whole = jobs.train(check, "whole", ranks, [*common, f"training.train_iters={STEPS}"])
    halves = jobs.train(check, "halves", ranks, [*common, f"training.train_iters={FIRST}"])
    compare_samples(whole, halves, range(1, FIRST + 1), "a second run")
    jobs.train(check, "halves", ranks, [*common, f"training.train_iters={STEPS}"])
    compare_samples(whole, halves, range(FIRST + 1, STEPS + 1), "the run that was resumed")
    other = list(differences(read_metrics(whole), read_metrics(halves)))
    last = jobs.metrics(whole)[-1]
    if other:
        numbers = f"{len(other)} metrics differ in some digit, first {other[0]}"
    else:
        numbers = "and so are all metrics, bit for bit"
    return Figures(
        f"{STEPS} steps on {ranks} ranks, invariants hold; all samples are the same in a second run "
        f"and in one that is resumed after step {FIRST}; {numbers}",
        {"different_metrics": other[:20], "last_step": last},
    )


def compare_samples(whole: Path, halves: Path, steps: range, what: str) -> None:
    """CheckFailed where a sample of these steps is another."""
    for step in steps:
        theirs = jobs.samples(whole, step)
        ours = jobs.samples(halves, step)
        wrong = 0
        for one, two in zip(theirs, ours, strict=True):
            wrong += any(one[key] != two[key] for key in COMPARED)
        if wrong:
            raise CheckFailed(
                f"step {step}: {wrong} of {len(theirs)} samples of {what} are others", ADVICE
            )
