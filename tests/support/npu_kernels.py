"""Which of PyTorch's operators have a kernel for NPUs: the list that torch_npu's wheels carry
(tests/npu_standin/contract/kernels.txt, by tools/torch_npu_contract.py).

Without a kernel an operator runs on the host, with copies there and back, or fails where
TORCH_NPU_FALLBACK_CPU_DISABLE=1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import torchgen
import yaml
from support.npu_contract import TABLE

NATIVE_FUNCTIONS = (
    Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
)
# PyTorch computes these by other operators, which are recorded themselves.
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")


def missing_kernels(ops: Iterable[str], kernels: frozenset[str] = TABLE.kernels) -> list[str]:
    """Of the operators that ran on a device, such as "aten::add.Tensor", those without a kernel in
    the oldest or the newest release of torch_npu."""
    names = [name.removeprefix("aten::") for name in ops if name.startswith("aten::")]
    return sorted(name for name in names if not _runs(name, kernels))


def _runs(name: str, kernels: frozenset[str]) -> bool:
    if name in kernels or _is_composite(name):
        return True
    outer = _outer_forms().get(name, [])
    return bool(outer) and all(form in kernels for form in outer)


def _is_composite(name: str) -> bool:
    operator = f"aten::{name}"
    if not torch._C._dispatch_has_kernel(operator):
        return False  # no operator of this PyTorch
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(operator, key) for key in COMPOSITE)


@cache
def _outer_forms() -> dict[str, list[str]]:
    """The forms that PyTorch computes by an inner one, where a device has no kernel for them, as the
    stand-in has none: index.Tensor by index.Tensor_out, add.Tensor and add_.Tensor by add.out."""
    outer = defaultdict(list)
    for entry in yaml.load(NATIVE_FUNCTIONS.read_text(), yaml.CSafeLoader):
        inner = entry.get("structured_delegate")
        if inner is not None:
            outer[inner].append(entry["func"].partition("(")[0])
    return dict(outer)
