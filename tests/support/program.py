"""Run a program of ours in a process forked from this one, which has the heavy imports: seconds less
than a new interpreter. What it imports, and when, needs a new one."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from support.multiproc import DEVICE  # noqa: F401 - what a forked rank must find imported
from support.patience import LONG
from support.warm_rewards import fork_from_here


def run_program(
    script: str | Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python SCRIPT ARGUMENTS` would leave: exit code, standard output, standard error.

    With the `environment` (default this process's), in the `folder` (default this one). AssertionError
    when it takes too long.
    """
    command = [str(script), *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = multiprocessing.get_context("fork").Process(
            target=_be,
            args=(command, dict(environment or os.environ), folder, out.fileno(), err.fileno()),
        )
        process.start()
        process.join(LONG)
        try:
            assert process.exitcode is not None, f"{command} does not end"
        finally:
            process.kill()
            process.join()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _be(
    command: list[str],
    environment: dict[str, str],
    folder: str | Path | None,
    out: int,
    err: int,
) -> None:
    """Become the program."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    # pytest has put its own there
    sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115 - for the life of the process
    sys.stdout = sys.__stdout__ = open(1, "w")  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    fork_from_here()
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
