"""C++ kernels of CPUs: compiled once per machine and kept in the user's cache folder.

Without a C++ compiler, or where a library cannot be loaded, `load` says why, and PyTorch's operators
do the same, slower and with equal results within float error.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

VECTORS = Path(__file__).with_name("vectors.h")  # that every source includes
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    f"-I{VECTORS.parent}",
)
COMPILERS = ("c++", "g++", "clang++")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}


@functools.cache
def load(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels of a C++ file, or None and the reason why there are none."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    try:
        library = _library(source)
        if not library.is_file():
            if compiler is None:
                return None, "no C++ compiler (c++, g++ or clang++) was found"
            compile_once(compiler, source, library)
        return ctypes.CDLL(str(library)), ""
    except subprocess.CalledProcessError as error:
        return None, (
            f"{compiler} could not compile {source.name}: {' '.join(error.stderr.splitlines()[:1])}"
        )
    except (OSError, RuntimeError) as error:  # the latter of a user without a home folder
        return None, f"{source.name} could not be compiled or loaded: {error}"


@functools.cache
def function(
    library: ctypes.CDLL, name: str, signature: tuple, dtype: torch.dtype
) -> Callable[..., None]:
    """A function of a library that exists once for each of TYPES, with the types of its arguments."""
    found = library[f"{name}_{TYPES[dtype]}"]
    found.argtypes = signature
    found.restype = None
    return found


def _library(source: Path) -> Path:
    """Where the library of this source and processor is kept: one home folder may serve several
    kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
    else:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    texts = (source.read_text(), VECTORS.read_text())
    about = "\n".join((*texts, *FLAGS, platform.platform(), features))
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "r1zero" / f"{source.stem}-{key}.so"


def compile_once(compiler: str, source: Path, library: Path) -> None:
    """Compile where no other process of this user does, else wait for it: the ranks of a node start
    together, and sixty compilers at once take all its memory."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as turn:
        # a home folder may be on a file system without locks: then each rank compiles
        with contextlib.suppress(OSError):
            fcntl.flock(turn, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(compiler, source, library)


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Compile under another name, then rename: processes that start together never see half a
    file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = Path(folder, "kernels.o")
        made = Path(folder, "kernels.so")
        # Linked without -fopenmp: the calls then meet the OpenMP that torch has loaded, and its
        # threads.
        for command in (
            [*FLAGS, "-c", str(source), "-o", str(objects)],
            ["-shared", str(objects), "-o", str(made), "-lm"],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
        os.replace(made, library)
