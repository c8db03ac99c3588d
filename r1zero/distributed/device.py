"""The device seam: Ascend NPU, NVIDIA GPU or plain CPU behind one object.

The only file that imports torch_npu and MindSpeed, and the only one that may change how torch or
Megatron see the hardware. `prepare` must run before anything from Megatron is imported: MindSpeed
patches Megatron while it is imported, and on a CPU the few CUDA calls that megatron-core makes
without asking must already answer for the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._device

# Side of the compressed causal mask that the NPU attention reads for any sequence length.
NPU_MASK_SIDE = 2048

log = logging.getLogger("r1zero")


@dataclass(frozen=True)
class Device:
    """What a rank computes on. `backend` is torch.distributed's name for its collectives."""

    kind: str  # "npu", "cuda" or "cpu"
    torch: torch.device
    backend: str  # "hccl", "nccl" or "gloo"

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def peak_gigabytes(self) -> float:
        """Highest memory use of this process: device memory, or resident memory on a CPU."""
        if not self.is_cpu:
            return _module(self.kind).max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def timer(self) -> HostTimer | EventTimer:
        """What tells when something was done here."""
        if self.is_cpu:
            return HostTimer()
        return EventTimer(_module(self.kind))

    def synchronize(self) -> None:
        """Wait until the device has done what was queued."""
        if not self.is_cpu:
            _module(self.kind).synchronize()

    @contextlib.contextmanager
    def trace(self, folder: Path, name: str) -> Iterator[None]:
        """Record what runs meanwhile into folder/name: a Chrome trace, on an NPU what its profiler
        writes."""
        if self.kind == "npu":
            profiler = torch_npu_module().profiler
            activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
            write = profiler.tensorboard_trace_handler(str(folder), worker_name=name)
        else:
            profiler = torch.profiler
            activities = [profiler.ProfilerActivity.CPU]
            if self.kind == "cuda":
                activities.append(profiler.ProfilerActivity.CUDA)
            write = partial(_write_trace, folder / f"{name}.json.gz")
        with profiler.profile(activities=activities, on_trace_ready=write):
            yield

    def group_options(self, buffer_megabytes: int) -> object | None:
        """Options for a group: HCCL takes two such buffers of device memory for each group in
        use."""
        if self.kind != "npu":
            return None
        options = torch_npu_module()._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": max(1, buffer_megabytes)}
        return options


class HostTimer:
    """Moments of a process that computes by itself. A clock that is set meanwhile does not bend
    them."""

    def __init__(self) -> None:
        self._set()

    def mark(self) -> float:
        """Mark this moment."""
        return time.perf_counter()

    def read(self, marks: Sequence[float]) -> list[float]:
        """When these moments were, in seconds since the epoch."""
        moments = [self._epoch + mark for mark in marks]
        self._set()
        return moments

    def _set(self) -> None:
        self._epoch = time.time() - time.perf_counter()


class EventTimer:
    """Moments of a device: events in its queue, which it passes when it has done what was queued
    before them."""

    def __init__(self, module: ModuleType) -> None:
        """`module` is torch.npu or torch.cuda."""
        self._module = module
        self._host = HostTimer()
        self._module.synchronize()
        self._set()

    def mark(self) -> tuple[float, Any]:
        """Queue an event."""
        return self._host.mark(), self._event()

    def read(self, marks: Sequence[tuple[float, Any]]) -> list[float]:
        """Wait for the device; when it passed these events, in seconds since the epoch."""
        self._module.synchronize()
        queued = self._host.read([moment for moment, _ in marks])
        passed = [self._epoch + self._first.elapsed_time(event) / 1000 for _, event in marks]
        self._set()
        # no event is passed before it is queued, though clocks drift apart
        return list(map(max, queued, passed))

    def _event(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def _set(self) -> None:
        """Tie the device's time to the host's; the device is idle."""
        self._first = self._event()
        self._epoch = time.time()


def _module(kind: str) -> ModuleType:
    """What stands for torch.cuda on this kind of device."""
    if kind == "npu":
        return torch_npu_module().npu
    return torch.cuda


def _write_trace(path: Path, recorded: torch.profiler.profile) -> None:
    """Write a Chrome trace; where that fails, as on a full disk, a warning is all."""
    try:
        for folder in (path.parent.parent, path.parent):  # owner.py says why not with all around
            folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(path))
    except OSError as error:
        log.warning(
            "warning: %s could not be written: %s; training goes on without it", path, error
        )


def detect() -> str:
    """The best kind of device that this machine has."""
    if importlib.util.find_spec("torch_npu") and _module("npu").is_available():
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def torch_npu_module():  # noqa: ANN201 - the module only exists on Ascend machines
    import torch_npu

    return torch_npu


def free_gigabytes(kind: str, indices: Sequence[int]) -> list[float]:
    """Free memory of these devices; on a CPU that of the host, once."""
    if kind == "cpu":
        return [psutil.virtual_memory().available / 1e9]
    return [_module(kind).mem_get_info(index)[0] / 1e9 for index in indices]


def count(kind: str) -> int:
    """Visible devices of a kind; 0 for CPUs."""
    if kind == "cpu":
        return 0
    return _module(kind).device_count()


def cann_version() -> str | None:
    """The version of the CANN toolkit whose set_env.sh was sourced."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for info in sorted(Path(home).glob("*/ascend_toolkit_install.info")) if home else ():
        match = re.search(r"^version=(\S+)", info.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return None


def prepare(kind: str, local_rank: int, deterministic: bool = False) -> Device:
    """Make the device current and Megatron importable on it. Call once, before importing
    Megatron."""
    assert kind in ("npu", "cuda", "cpu"), kind
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=kind != "cpu")
    if kind == "npu":
        _import_mindspeed()
    if kind == "cpu":
        _answer_cuda_with_cpu()
    return open_device(kind, local_rank)


def open_device(kind: str, local_rank: int) -> Device:
    """Make the device current, without Megatron."""
    if kind == "npu":
        _module(kind).set_device(local_rank)
        return Device(kind, torch.device("npu", local_rank), "hccl")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        return Device(kind, torch.device("cuda", local_rank), "nccl")
    return Device(kind, torch.device("cpu"), "gloo")


def _import_mindspeed() -> None:
    """Import torch_npu and MindSpeed's adaptor, hiding our command line from the adaptor.

    It parses sys.argv and would turn every flag it finds, ours too, into attributes of each
    TransformerConfig. And it replaces functions of torch.distributed, so the control plane takes
    its own first.
    """
    import r1zero.distributed.collectives  # noqa: F401

    torch_npu_module()
    argv = sys.argv
    sys.argv = [sys.argv[0], "--use-flash-attn"]
    try:
        import mindspeed.megatron_adaptor  # noqa: F401
    finally:
        sys.argv = argv


# -- megatron-core on a CPU ---------------------------------------------------------------------


def _cpu_device() -> torch.device:
    return torch.device("cpu")


class _NoStream:
    """Stands for torch.cuda.Stream, which must stay a class: libraries annotate with it."""

    def wait_stream(self, stream: object) -> None:
        """A CPU runs in order."""


def _answer_cuda_with_cpu() -> None:
    """Let the CUDA calls that megatron-core makes unasked answer for the CPU.

    This is the measured minimum for dense models with TP, PP, DP and SP; megatron-core 0.16.1 has
    no CPU platform of its own. Applied once; a second call does nothing.
    """
    if torch.cuda.current_device is _cpu_device:
        return
    torch.cuda.current_device = _cpu_device
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    torch.cuda.Stream = _NoStream
    torch.cuda.current_stream = lambda *_: _NoStream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *_, **__: self
    # remembers the true factories: `with torch.device("meta")` needs them
    torch.utils._device._device_constructors()
    torch.tensor = _on_cpu(torch.tensor)
    torch.zeros = _on_cpu(torch.zeros)
    _name_cpu_tensors_cuda()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _on_cpu(factory):  # noqa: ANN202 - same signature as the factory
    def make(*args, device=None, **kwargs):  # noqa: ANN002, ANN003, ANN202
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return make


def _name_cpu_tensors_cuda() -> None:
    """megatron-core's distributed optimizer sorts parameters by the string `tensor.type()`."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_


# -- fused attention ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens of a packed batch see which: each segment's queries see a prefix and, causally,
    themselves.

    Segment i holds the queries [cu_seqlens_q[i - 1], cu_seqlens_q[i]). Its keys are [cu_seqlens_k[i
    - 1], cu_seqlens_k[i]) of the tokens listed in `key_rows`: first the prefix, then the segment
    itself, so that the last query sees all of them. Without `key_rows` there is no prefix, and keys
    lie as the queries do. Both are cumulative lengths without the leading 0 of flash-attention's,
    and host integers, since the fused kernels take lists and must not wait for the device.
    """

    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]
    key_rows: torch.Tensor | None = None  # int64

    @classmethod
    def plain(cls, ends: list[int]) -> Segments:
        """Sequences laid end to end that see only themselves."""
        return cls(ends, ends)


def packed_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Causal attention within the segments of a packed batch, with grouped queries. Differentiable.

    query [T, heads, D], key and value [T, kv heads, D]. Returns [T, heads, D].
    """
    if segments.key_rows is not None:
        key = key[segments.key_rows]
        value = value[segments.key_rows]
    if query.device.type == "npu":
        return npu_attention(query, key, value, segments, scale)
    outputs = []
    for q, k, v in zip(
        *(
            _cut(*pair)
            for pair in (
                (query, segments.cu_seqlens_q),
                (key, segments.cu_seqlens_k),
                (value, segments.cu_seqlens_k),
            )
        ),
        strict=True,
    ):
        prefix = k.shape[2] - q.shape[2]
        mask = None
        if prefix:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(
                prefix
            )
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )[0]
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _cut(x: torch.Tensor, ends: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Cut [T, heads, D] where segments end into [1, heads, t, D]. One split, since the backward
    pass of every slice would fill and add a gradient of all T tokens."""
    return x.transpose(0, 1)[None].split(np.diff(ends, prepend=0).tolist(), dim=2)


def npu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """The same by torch_npu's fused training attention; key and value are laid out by key_rows
    already."""
    mask = torch.ones(NPU_MASK_SIDE, NPU_MASK_SIDE, dtype=torch.bool, device=query.device).triu(1)
    return torch_npu_module().npu_fusion_attention(
        query,
        key,
        value,
        head_num=query.shape[1],
        input_layout="TND",
        atten_mask=mask,
        scale=scale,
        actual_seq_qlen=segments.cu_seqlens_q,
        actual_seq_kvlen=segments.cu_seqlens_k,
        sparse_mode=3,
    )[0]  # 3: causal, aligned at the last query and the last key


def npu_paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Decode attention by torch_npu's fused inference kernel over a block cache.

    query [n, heads, D], keys and values [blocks, kv heads, block, D], block_table int32 [n, most
    blocks], lengths: tokens of each row. Returns [n, heads * D].
    """
    output, _ = torch_npu_module().npu_fused_infer_attention_score(
        query[:, :, None].contiguous(),
        keys,
        values,
        block_table=block_table,
        actual_seq_lengths_kv=lengths,
        num_heads=query.shape[1],
        num_key_value_heads=keys.shape[1],
        scale=query.shape[2] ** -0.5,
        input_layout="BNSD",
        block_size=keys.shape[2],
        sparse_mode=0,
    )
    return output.view(len(query), -1)


def capture_graph(run: Callable[[], torch.Tensor]) -> tuple[object, torch.Tensor]:
    """Capture what `run` launches as an NPU graph. Returns the graph and the tensor it will
    write."""
    npu = torch_npu_module().npu
    graph = npu.NPUGraph()
    # keeps the attention's host arguments replaceable
    with npu.graph(graph, auto_dispatch_capture=True):
        output = run()
    return graph, output


def replay_graph(graph: object, lengths: list[int]) -> None:
    """Run a captured decoding step again, for rows of these lengths."""
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
    graph.replay()


def warm_up(group: dist.ProcessGroup, device: Device) -> None:
    """Run the first collective of a group now. HCCL and NCCL connect there, and block until all
    come."""
    dist.all_reduce(torch.zeros(1, device=device.torch), group=group)
