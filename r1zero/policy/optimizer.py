"""AdamW for Megatron's distributed optimizer, so that its state can be resharded.

torch's own AdamW counts its steps in a tensor for each parameter, which megatron-core 0.16.1 cannot
bring back in a fresh process ("step" has no shard). Apex's and MindSpeed's fused Adams keep one
count in each parameter group; so does this one, and checkpoints have one layout on every device.
"""

from __future__ import annotations

from collections.abc import Iterable

import megatron.core.optimizer as optimizers
import torch
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adamw import adamw

FUSED = ("cpu", "cuda")  # devices for which torch has a fused kernel
MOMENTS = ("exp_avg", "exp_avg_sq")  # what every Adam calls its two


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) whose step count lies in its parameter groups."""

    def __init__(
        self,
        params: Iterable,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "weight decay is always decoupled"
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    # torch's may also be given a function that computes the loss; Megatron never does.
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {key: torch.zeros_like(parameter) for key in MOMENTS}
            states = [self.state[parameter] for parameter in parameters]
            device = parameters[0].device
            beta1, beta2 = group["betas"]
            # torch counts a step up before it takes it.
            steps = [torch.tensor(float(group["step"] - 1), device=device) for _ in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                fused=True if device.type in FUSED else None,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Let Megatron build this optimizer where it would take torch's own; where a fused one is
    installed, that stays."""
    if optimizers.USING_PYTORCH_OPTIMIZER:
        optimizers.Adam = distrib_optimizer.Adam = GroupStepAdamW
        optimizers.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
