"""Item `versions`: what is installed against what was tested, MindSpeed's import, the devices."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import set_variables
from r1zero.distributed import device as devices
from r1zero.distributed.detect import cann_version
from r1zero.distributed.megatron_on_npu import import_mindspeed
from r1zero.distributed.torch_modules import device_module, torch_npu_module
from r1zero.preflight.versions import check_versions, installed

# The folder of the tests' stand-in for torch_npu: what runs on it says nothing about a device.
STANDIN = "npu_standin"


def run(check: Check) -> Figures:
    """Versions, patches, devices and their memory."""
    set_variables()
    versions = installed("npu", cann_version())
    versions["torch"] = torch.__version__
    versions["torch-npu"] = torch_npu_module().__version__
    problems = check_versions("npu", versions)
    patches = imported_patches()
    values = {
        "versions": versions | {"python": platform.python_version(), "driver": driver()},
        "mindspeed_patches": patches,
        "devices": device_module("npu").device_count(),
        "device_name": device_module("npu").get_device_name(0),
        "free_gigabytes": devices.free_gigabytes("npu", range(check.devices)),
        "standin": is_standin(),
    }
    if problems and not is_standin():
        raise CheckFailed("; ".join(problems), "install what is named, in this order")
    return Figures(line(values), values)


def imported_patches() -> int | None:
    """Import MindSpeed's adaptor; the number of its patches, None where it does not tell."""
    try:
        import_mindspeed()
    except Exception as error:
        # its patches run while it is imported, and may raise anything; told with its type
        raise CheckFailed(
            f"MindSpeed's adaptor cannot be imported: {type(error).__name__}: {error}",
            "clone MindSpeed's branch core_r0.16.0, `pip install -e` the clone, and install what "
            "the sentence above misses (einops, scipy, triton-ascend)",
        ) from error
    module = sys.modules.get("mindspeed.patch_utils")
    if module is None:
        return None
    return len(module.MindSpeedPatchesManager.patches_info)


def driver() -> str | None:
    """The first line of `npu-smi info` that names a version; None where there is no npu-smi."""
    if shutil.which("npu-smi") is None:
        return None
    done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, check=False)
    for text in done.stdout.splitlines():
        if "Version" in text:
            return " ".join(text.strip("| \n").split())
    return None


def is_standin() -> bool:
    """Whether torch_npu is the one that the tests play."""
    return STANDIN in Path(str(torch_npu_module().__file__)).parts


def line(values: dict) -> str:
    """The figures in words."""
    versions = values["versions"]
    named = [f"{name} {versions[name]}" for name in versions if versions[name] is not None]
    if values["mindspeed_patches"] is not None:
        named.append(f"{values['mindspeed_patches']} patches of MindSpeed")
    free = values["free_gigabytes"]
    named.append(f"{values['devices']} x {values['device_name']}, {min(free):.1f} GB free")
    if values["standin"]:
        named.append("the tests' stand-in, so versions were not judged")
    return ", ".join(named)
