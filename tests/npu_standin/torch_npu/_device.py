"""device.cpp, compiled once for this torch and kept: the device "npu" in host memory.

Kept in NPU_STANDIN_BUILD, else in the user's cache folder. Needs a C++ compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")


def build() -> Path:
    """The compiled device; made if it is not there. Processes that start together may all make it."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("NPU_STANDIN_BUILD") or cache / "r1zero" / "npu_standin")
    library = folder / f"device-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            _compile(made)
            made.replace(library)
    return library


def _compile(library: Path) -> None:
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    command = [
        os.environ.get("CXX", "g++"),
        *FLAGS,
        abi,
        *includes,
        str(SOURCE),
        "-o",
        str(library),
        *libraries,
        "-ltorch_cpu",
        "-lc10",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"device.cpp could not be compiled:\n{done.stderr[-4000:]}")


class Device:
    """The functions of device.cpp."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        for name in ("bytes", "peak_bytes"):
            getattr(self._library, f"standin_{name}").restype = ctypes.c_int64
        self._library.standin_seen.restype = ctypes.c_char_p
        self.count: int = self._library.standin_device_count()

    def init(self) -> None:
        """Tell PyTorch that the device is there."""
        self._library.standin_init()

    @property
    def current(self) -> int:
        return self._library.standin_current_device()

    @current.setter
    def current(self, index: int) -> None:
        self._library.standin_set_device(index)

    def bytes(self, index: int) -> int:
        """Bytes that tensors of a device take now."""
        return self._library.standin_bytes(index)

    def peak_bytes(self, index: int) -> int:
        """The most that they took since the peak was reset."""
        return self._library.standin_peak_bytes(index)

    def reset_peak(self, index: int) -> None:
        """Begin to look for the most anew."""
        self._library.standin_reset_peak(index)

    def seen(self) -> set[str]:
        """Names of the aten operators that ran on the device, such as aten::add.Tensor."""
        return set(self._library.standin_seen().decode().split())


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a device tensor, seen as a CPU tensor."""
    return torch.ops.npu_standin.host_view(tensor.detach())
