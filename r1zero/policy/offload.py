"""Optimizer offload: fp32 master weights and Adam's moments lie in host memory between updates.

Megatron's distributed optimizer holds 12 bytes for each parameter of its shard: a master weight and
two moments. Here they lie on the host, and visit the device some at a time, while an update runs:

    host (pinned)                                    device
    master, exp_avg, exp_avg_sq   -- brought -->     stepped with its gradient, by the same Adam;
                                  <-- sent back --   the new weights are written into the model

So the numbers are bit for bit those of an optimizer that stays. The bus carries 24 bytes of each
parameter of the shard in an update (fp32 weights are their own masters: 16). ZeRO-Offload
(arXiv:2101.06840) steps on the host instead, whose Adam rounds in another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from r1zero.distributed.device import Device
from r1zero.models.sizes import OFFLOAD_VISIT_ELEMENTS
from r1zero.policy.optimizer import MOMENTS

# Attribute of a master weight that is away: where its values are.
ON_HOST = "on_host"
# Megatron's name of what copies all masters into the model after a step: each is copied while it is
# here.
COPY_MASTERS = "_copy_main_params_to_model_params"


class OffloadedState:
    """The state of one distributed optimizer, on the host."""

    def __init__(self, optimizer: DistributedOptimizer, device: Device) -> None:
        """Move the masters to the host, begin with moments of zero, and take over the steps of
        `optimizer`, which must not have taken one."""
        self._adam = optimizer.optimizer
        self._device = device
        self._step_what_is_here = self._adam.step
        # What stands for a master that is away: whoever reads it finds no number.
        self._away = torch.full((1,), torch.nan, device=device.torch)
        self._weights: dict[torch.Tensor, torch.Tensor] = {}  # of the model, by their masters
        for masters, weights in zip(
            optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True
        ):
            self._weights.update(zip(masters, weights, strict=True))
        assert not self._adam.state, "it has taken a step"
        self._moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}  # on the host
        for group in self._adam.param_groups:
            for parameter in group["params"]:
                self._moments[parameter] = self._no_moments(parameter)
        self._adam.state.update(self._moments)
        for master in self._weights:
            setattr(master, ON_HOST, self._host_memory(master).copy_(master))
            self._leave(master)
        self._adam.step = self.step
        self._adam.load_state_dict = self.load_groups
        setattr(optimizer, COPY_MASTERS, lambda: None)

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        groups = self._adam.param_groups
        for group in groups:
            self._adam.param_groups = [group]
            self._step_group(group)
        self._adam.param_groups = groups
        self._device.synchronize()  # a checkpoint reads the host's memory

    def load_groups(self, state: Mapping[str, Any]) -> None:
        """Take what belongs to whole groups of parameters, such as the count of steps. torch would
        bring the tensors to the device; what reads a checkpoint fills those of the host."""
        for group, saved in zip(self._adam.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _step_group(self, group: dict[str, Any]) -> None:
        """Step one group, which stands alone in the optimizer, visit by visit. Each of them counts
        the same step."""
        everything = group["params"]
        count = group.get("step", 0)
        for visit in visits(everything, OFFLOAD_VISIT_ELEMENTS):
            group["params"] = visit
            group["step"] = count
            for parameter in visit:
                self._bring(parameter)
            self._step_what_is_here()
            for parameter in visit:
                self._send_back(parameter)
        group["params"] = everything

    def _bring(self, parameter: torch.Tensor) -> None:
        """Let a parameter and its moments come to the device."""
        moments = self._moments[parameter]
        self._adam.state[parameter] = {name: self._here(moments[name]) for name in MOMENTS}
        if parameter in self._weights:
            parameter.data = self._here(master_of(parameter))

    def _send_back(self, parameter: torch.Tensor) -> None:
        """Take their values to the host, and into the model."""
        moments = self._moments[parameter]
        for name in MOMENTS:
            moments[name].copy_(self._adam.state[parameter][name], non_blocking=True)
        self._adam.state[parameter] = moments
        if parameter in self._weights:
            self._weights[parameter].copy_(parameter)
            master_of(parameter).copy_(parameter, non_blocking=True)
            self._leave(parameter)

    def _leave(self, master: torch.Tensor) -> None:
        """Give the device's memory back; shape, type and gradient stay."""
        master.data = self._away.expand(master.shape)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device. On a CPU that is a copy, too, so that all goes the same way."""
        return torch.empty_like(tensor, device=self._device.torch).copy_(tensor, non_blocking=True)

    def _no_moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both moments before the first update."""
        return {name: self._host_memory(parameter).zero_() for name in MOMENTS}

    def _host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for such a tensor, pinned where a device copies from and to it."""
        pinned = not self._device.is_cpu
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)


def visits(parameters: Sequence[torch.Tensor], elements: int) -> Iterator[list[torch.Tensor]]:
    """Parameters in their order, so many elements together at most; a larger one comes alone."""
    visit: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if visit and size + parameter.numel() > elements:
            yield visit
            visit = []
            size = 0
        visit.append(parameter)
        size += parameter.numel()
    if visit:
        yield visit


def master_of(parameter: torch.Tensor) -> torch.Tensor:
    """Where the values of an optimizer's parameter are: on the host if it is offloaded."""
    return getattr(parameter, ON_HOST, parameter)
