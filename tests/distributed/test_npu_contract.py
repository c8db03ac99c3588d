"""What is called of torch_npu and MindSpeed beside operators: options, profiler, command line. No
NPU is here: these tests mock one."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.multiproc import DEVICE

from r1zero.distributed.device import Device
from r1zero.distributed.megatron_on_npu import import_mindspeed


def test_mindspeed_does_not_see_our_command_line(monkeypatch):
    seen = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "mindspeed.megatron_adaptor":
                seen.append(list(sys.argv))
            return

    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace())
    package = types.ModuleType("mindspeed")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "mindspeed", package)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    argv = ["main.py", "--config", "qwen25_7b", "training.train_iters=3"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ModuleNotFoundError):
        import_mindspeed()
    assert seen == [["main.py", "--use-flash-attn"]] and sys.argv == argv


def test_hccl_groups_have_bounded_buffers(monkeypatch):
    options = types.SimpleNamespace
    group = types.SimpleNamespace(ProcessGroupHCCL=types.SimpleNamespace(Options=options))
    monkeypatch.setitem(
        sys.modules,
        "torch_npu",
        types.SimpleNamespace(_C=types.SimpleNamespace(_distributed_c10d=group)),
    )
    on_npu = Device("npu", torch.device("cpu"), "hccl")
    assert on_npu.group_options(200).hccl_config == {"hccl_buffer_size": 200}
    assert DEVICE.group_options(200) is None


def test_the_cpu_answers_for_cuda_without_harm():
    assert (
        torch.zeros(1, device="cuda").device.type == "cpu"
        and torch.tensor([1], device="cuda").device.type == "cpu"
    )
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta" and torch.tensor([1.0]).device.type == "meta"
    assert (
        torch.ones(2).type() == "torch.cuda.FloatTensor"
        and torch.ones(2).type(torch.int64).dtype == torch.int64
    )
    assert np.asarray(torch.ones(2)).sum() == 2 and not dist.is_initialized()


def test_steps_are_traced_with_the_npu_profiler(tmp_path, monkeypatch):
    seen = []

    class Profile:
        def __init__(self, *, activities, on_trace_ready):  # no other argument is needed
            seen.append(activities)
            self._ready = on_trace_ready

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._ready(self)

    def tensorboard_trace_handler(
        dir_name=None, worker_name=None, analyse_flag=True, async_mode=False
    ):
        return lambda _: seen.append((dir_name, worker_name))

    activity = types.SimpleNamespace(CPU="cpu", NPU="npu")
    profiler = types.SimpleNamespace(
        profile=Profile,
        ProfilerActivity=activity,
        tensorboard_trace_handler=tensorboard_trace_handler,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(profiler=profiler))
    with Device("npu", torch.device("cpu"), "hccl").trace(tmp_path, "train_rank_0000"):
        seen.append("step")
    assert seen == [["cpu", "npu"], "step", (str(tmp_path), "train_rank_0000")]
