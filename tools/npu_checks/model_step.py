"""Item `model_step`: steps of a model of 0.5B parameters on all devices: time by phase, memory against
the dry run's estimate, tokens a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npu_checks import jobs
from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.mismatch import model_name, model_overrides
from r1zero.preflight.found import look
from r1zero.preflight.memory import memory
from r1zero.preflight.resolve import load_config

STEPS = 2  # of which the second is told: the first compiles and captures
OFF = 0.25  # of the estimate of memory, either way
PHASES = ("rollout", "reward", "ref", "update", "publish", "step")


def run(check: Check) -> Figures:
    """Train two steps."""
    jobs.make_tiny()
    ranks, layout = layout_of(1 if check.small else check.devices)
    overrides = [f"training.train_iters={STEPS}", *model_overrides(check), *layout]
    step = jobs.metrics(jobs.train(check, "run", ranks, overrides))[-1]
    estimates = estimated([*jobs.ALWAYS, *overrides], ranks)
    peaks = {role: step[f"memory/peak_gigabytes/{role}"] for role in estimates}
    if not check.small:
        compare_memory(peaks, estimates)
    return figures(check, ranks, step, peaks, estimates)


def layout_of(devices: int) -> tuple[int, list[str]]:
    """Number of ranks, and the overrides that deal them out: half of them train, one is the
    reference, the others roll out; below four devices one rank has all roles."""
    if devices < 4:
        return 1, []
    train = 1
    while train * 4 <= devices:
        train *= 2
    rollout = devices - train - 1
    return devices, [
        f"actor_rollout.num_gpus_for_train={train}",
        f"actor_rollout.num_gpus_for_infer={rollout}",
        f"resource_pool.actor_rollout=[{train + rollout}]",
        "resource_pool.ref=[1]",
    ]


def estimated(overrides: list[str], ranks: int) -> dict[str, float]:
    """Gigabytes that the dry run expects on the fullest rank of each role; where a rank has all
    roles, all of them together."""
    cfg, _ = load_config(jobs.CONFIG, overrides)
    found = look(cfg, ranks)
    assert found.placement is not None and found.actor.shape is not None
    expected = memory(cfg, found.placement, found.actor.shape, found.reference_shape)
    alone = {role: entry.total / 1e9 for role, entry in expected.items()}
    if found.placement.colocated:
        return dict.fromkeys(alone, sum(alone.values()))
    return alone


def compare_memory(peaks: Mapping[str, float], estimates: Mapping[str, float]) -> None:
    """CheckFailed where the estimate is far off."""
    wrong = []
    for role, estimate in estimates.items():
        if not abs(peaks[role] - estimate) <= OFF * estimate:
            wrong.append(f"{role} took {peaks[role]:.2f} GB, the dry run says {estimate:.2f}")
    if wrong:
        raise CheckFailed(
            "; ".join(wrong),
            "the step itself went well; until the estimate is mended trust what is measured, "
            "and send us the JSON",
        )


def figures(
    check: Check,
    ranks: int,
    step: Mapping[str, Any],
    peaks: Mapping[str, float],
    estimates: Mapping[str, float],
) -> Figures:
    """Times, memory and speed of the last step."""
    times = {phase: step[f"time/{phase}"] for phase in PHASES}
    rate = step["tokens/response"] / times["rollout"]
    said = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in times.items())
    held = ", ".join(f"{role} {peaks[role]:.2f} of {estimates[role]:.2f}" for role in estimates)
    line = (
        f"{model_name(check)} on {ranks} ranks: seconds {said}; {rate:.0f} tokens a second; "
        f"GB {held} estimated"
    )
    if check.small:
        line += "; too small to judge the estimate"
    return Figures(
        line,
        {"seconds": times, "tokens_per_second": rate, "peaks": peaks, "estimates": estimates},
    )
