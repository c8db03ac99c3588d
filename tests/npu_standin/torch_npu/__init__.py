"""Stands for torch_npu where no NPU is: a device "npu" in host memory, operators with the published
signatures, HCCL over gloo. See README.md beside this package for what it shows and what not.
"""

from __future__ import annotations

import sys
import types

import torch

torch.utils.rename_privateuse1_backend("npu")

from torch_npu._device import Device, build  # noqa: E402

_device = Device(build())

from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()
_device.init()

from torch_npu import _contract, _hccl, _record, profiler, utils  # noqa: E402, F401

__version__ = _contract.RELEASE
for _name in _contract.define_operators():
    globals()[_name] = getattr(torch.ops.npu, _name)

from torch_npu import _attention, _experts, _kernels  # noqa: E402, F401

# What MindSpeed reads: types that the device does not have.
unsupported_dtype = [torch.quint8, torch.quint4x2, torch.quint2x4, torch.qint32, torch.qint8]

_C = types.ModuleType("torch_npu._C")
_C._distributed_c10d = types.ModuleType("torch_npu._C._distributed_c10d")
_C._distributed_c10d.ProcessGroupHCCL = _hccl.ProcessGroupHCCL
sys.modules["torch_npu._C"] = _C
sys.modules["torch_npu._C._distributed_c10d"] = _C._distributed_c10d
_hccl.register()
_record.record_at_exit()


def get_npu_format(tensor: torch.Tensor) -> int:
    """The memory format of a tensor: 2, plain."""
    return 2
