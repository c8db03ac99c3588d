"""Item `mismatch`: rollout and trainer give the same tokens nearly the same log-probs.

They compute alike by different kernels. A wrong mask, cache or position shows here, whatever every
operator does by itself.
"""

from __future__ import annotations

from npu_checks import jobs, models
from npu_checks.check import Check, CheckFailed, Figures

# Largest mean difference in nats, bf16. Seen on CPUs: 0.002 for the tiny model, 0.02 to 0.04 for
# models of 0.1B to 0.5B.
TINY_BOUND = 0.005
MODEL_BOUND = 0.05


def run(check: Check) -> Figures:
    """One step on one device; the metrics of the run itself."""
    jobs.make_tiny()
    overrides = ["training.train_iters=1", *model_overrides(check)]
    folder = jobs.train(check, "run", 1, overrides)
    [step] = jobs.metrics(folder)
    bound = TINY_BOUND if check.small else MODEL_BOUND
    mean = step["mismatch/mean"]
    if not mean <= bound:
        raise CheckFailed(
            f"log-probs of rollout and trainer differ by {mean:.3g} nats on average (largest "
            f"{step['mismatch/max']:.3g}), more than {bound:g}",
            "run `--only operators,graphs`; if both pass, try actor_rollout.decode_graphs=false, "
            "and send us the JSON",
        )
    return Figures(
        f"{model_name(check)}: {mean:.2g} nats on average, {step['mismatch/max']:.2g} at most, over "
        f"{step['tokens/response']} tokens; the bound is {bound:g} on average",
        {"mean": mean, "max": step["mismatch/max"], "tokens": step["tokens/response"]},
    )


def model_overrides(check: Check) -> list[str]:
    """What makes the tiny job one on the model of this check."""
    if check.small:
        return list(jobs.SMALL)
    folder = check.model
    if folder is None:
        folder = models.write_half_billion(check.folder / "model", jobs.TINY)
    return [*jobs.LARGE, f"actor_rollout.load={folder}", f"ref.load={folder}"]


def model_name(check: Check) -> str:
    """What the figures are of."""
    if check.small:
        return "the embedded tiny model"
    if check.model is None:
        return "random weights in the shape of Qwen2.5-0.5B"
    return check.model.name
