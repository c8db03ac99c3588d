"""The device of a rank: Ascend NPU (HCCL), NVIDIA GPU (NCCL) or plain CPU (gloo) behind one object.

`prepare` must run before anything from Megatron is imported: see megatron_on_npu and
megatron_on_cpu. What is computed on a device by kernels of its own is in r1zero/ops.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from r1zero.distributed import profiler
from r1zero.distributed.device_timer import EventTimer, HostTimer
from r1zero.distributed.megatron_on_cpu import answer_cuda_with_cpu
from r1zero.distributed.megatron_on_npu import import_mindspeed
from r1zero.distributed.npu_environment import group_config
from r1zero.distributed.torch_modules import device_module, torch_npu_module


@dataclass(frozen=True)
class Device:
    """What a rank computes on. `backend` is torch.distributed's name for its collectives."""

    kind: str  # "npu", "cuda" or "cpu"
    torch: torch.device
    backend: str  # "hccl", "nccl" or "gloo"

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def control_backend(self) -> str:
        """Backend of groups whose tensors are on the CPU, but for a few of Megatron's."""
        if self.is_cpu:
            return "gloo"
        return f"cpu:gloo,{self.kind}:{self.backend}"

    def peak_gigabytes(self) -> float:
        """Highest memory use of this process: device memory, or resident memory on a CPU."""
        if not self.is_cpu:
            return device_module(self.kind).max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def timer(self) -> HostTimer | EventTimer:
        """What tells when something was done here."""
        if self.is_cpu:
            return HostTimer()
        return EventTimer(self.kind)

    def synchronize(self) -> None:
        """Wait until the device has done what was queued."""
        if not self.is_cpu:
            device_module(self.kind).synchronize()

    def trace(self, folder: Path, name: str) -> AbstractContextManager[None]:
        """Record what runs meanwhile into folder/name: see profiler.trace."""
        return profiler.trace(self.kind, folder, name)

    def group_options(self, buffer_megabytes: int, decodes: bool = False) -> object | None:
        """Options for a group: HCCL takes two such buffers of device memory for each group in
        use. `decodes` if it sums while tokens are decoded, see group_config."""
        if self.kind != "npu":
            return None
        options = torch_npu_module()._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = group_config(os.environ, buffer_megabytes, decodes)
        return options


def multiplies(device: Device, dtype: torch.dtype) -> bool:
    """Whether a device has products of this type. A CPU takes bf16 without AVX-512 or the like, too, many
    times slower than fp32."""
    if not device.is_cpu or dtype != torch.bfloat16:
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def detect() -> str:
    """The best kind of device that this machine has."""
    if importlib.util.find_spec("torch_npu") and device_module("npu").is_available():
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def count(kind: str) -> int:
    """Visible devices of a kind; 0 for CPUs."""
    if kind == "cpu":
        return 0
    return device_module(kind).device_count()


def free_gigabytes(kind: str, indices: Sequence[int]) -> list[float]:
    """Free memory of these devices; on a CPU that of the host, once."""
    if kind == "cpu":
        return [psutil.virtual_memory().available / 1e9]
    return [device_module(kind).mem_get_info(index)[0] / 1e9 for index in indices]


def prepare(kind: str, local_rank: int, deterministic: bool = False) -> Device:
    """Make the device current and Megatron importable on it. Call once, before importing
    Megatron."""
    assert kind in ("npu", "cuda", "cpu"), kind
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=kind != "cpu")
    if kind == "npu":
        import_mindspeed()
    if kind == "cpu":
        answer_cuda_with_cpu()
    return open_device(kind, local_rank)


def open_device(kind: str, local_rank: int) -> Device:
    """Make the device current, without Megatron."""
    if kind == "npu":
        device_module(kind).set_device(local_rank)
        return Device(kind, torch.device("npu", local_rank), "hccl")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        return Device(kind, torch.device("cuda", local_rank), "nccl")
    return Device(kind, torch.device("cpu"), "gloo")


def warm_up(group: dist.ProcessGroup, device: Device) -> None:
    """Run the first collective of a group now. HCCL and NCCL connect there, and block until all
    come."""
    dist.all_reduce(torch.zeros(1, device=device.torch), group=group)
