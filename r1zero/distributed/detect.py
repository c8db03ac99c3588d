"""Which accelerator a run will use and which CANN toolkit is here; imports torch only if needed."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from r1zero.distributed.launch import hush_torch
from r1zero.errors import BadInput


def uses_npu(backend: str | None) -> bool:
    """Whether a run with this `training.distributed_backend` computes on NPUs here.

    BadInput where torch_npu is installed and cannot be imported.
    """
    if backend == "gloo" or importlib.util.find_spec("torch_npu") is None:
        return False
    hush_torch()
    try:
        return device_kind(backend) == "npu"
    except (ImportError, OSError, RuntimeError) as error:
        # torch imports it by itself, and raises what it likes
        raise BadInput(
            f"torch_npu is installed and cannot be imported ({' '.join(str(error).split())}); "
            "source CANN's set_env.sh, or set training.distributed_backend=gloo to run on CPUs"
        ) from None


def device_kind(backend: str | None) -> str:
    """npu, cuda or cpu: what a run with this `training.distributed_backend` computes on here."""
    from r1zero.distributed import device

    if backend == "gloo":
        return "cpu"
    return device.detect()


def check_dtype(given: str, bf16: bool, backend: str | None) -> list[str]:
    """A sentence if the device here cannot compute in this type; `given` is what the user wrote,
    and its value."""
    if bf16 or not uses_npu(backend):
        return []
    return [
        f"{given} cannot run on NPUs: their fused attention for generation has no fp32; ask for "
        "bf16, or leave it out, which means bf16 there"
    ]


def cann_version() -> str | None:
    """The version of the CANN toolkit whose set_env.sh was sourced."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for info in sorted(Path(home).glob("*/ascend_toolkit_install.info")) if home else ():
        match = re.search(r"^version=(\S+)", info.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return None
