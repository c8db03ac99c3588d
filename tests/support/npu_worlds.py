"""Worlds of ranks on the stand-in for torch_npu (tests/npu_standin), forked from a warm server.

With R1ZERO_MINDSPEED=CLONE the ranks import the real MindSpeed, else the minimal adaptor.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.patience import LONG

TESTS = Path(__file__).resolve().parents[1]
STANDIN = TESTS / "npu_standin"
TOOLS = TESTS.parent / "tools"
CLONE = os.environ.get("R1ZERO_MINDSPEED")
ADAPTOR = "mindspeed" if CLONE else "minimal"


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that finds the stand-in where it looks for torch_npu."""
    if CLONE and not (Path(CLONE) / "mindspeed" / "megatron_adaptor.py").exists():
        raise AssertionError(f"R1ZERO_MINDSPEED={CLONE} is no clone of MindSpeed")
    adaptor = CLONE or str(STANDIN / "minimal")
    paths = [str(TESTS.parent), str(STANDIN), adaptor, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


class NpuServer:
    """A process that forks ranks on request."""

    def __init__(self, log: Path) -> None:
        """`log` gets what the ranks print."""
        self._pipe, other = multiprocessing.Pipe()
        self._log = log
        self._kernels = log.with_suffix(".kernels")
        path = os.pathsep.join([environment()["PYTHONPATH"], str(TESTS), str(TOOLS)])
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.npu_server", str(other.fileno())],
                env=environment(PYTHONPATH=path, NPU_STANDIN_OPS=str(self._kernels)),
                pass_fds=[other.fileno()],
                stdout=file,
                stderr=file,
            )
        other.close()

    def run(self, body: str, size: int, *arguments: Any) -> list[Any]:
        """Call `npu_bodies.body(rank, size, store, *arguments)` on every rank; the results in the
        order of ranks."""
        try:
            self._pipe.send((body, size, arguments))
            assert self._pipe.poll(LONG), "the ranks do not answer"
            results, error = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            raise AssertionError(f"the server died:\n{self._log.read_text()[-4000:]}") from None
        if error is not None:
            raise AssertionError(error)
        return results

    def train(self, folder: Path, size: int, overrides: list[str], fp32: bool = False) -> Path:
        """Train the tiny model on `size` ranks into a folder; returns the folder."""
        body = "train_in_fp32" if fp32 else "train_as_on_npus"
        self.run(body, size, "tiny", [*overrides, f"output_dir={folder}"])
        return folder

    def kernels(self) -> set[str]:
        """The aten operators that ran on the devices of all ranks so far, as aten::add.Tensor."""
        return set(self._kernels.read_text().split())

    def close(self) -> None:
        """End the server."""
        self._pipe.close()
        self._process.wait()
