"""The process that forks the reward workers: one thread, nothing of the user's, and no worker that
outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.boxed import boxed
from support.patience import wait_until

from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.types import RewardInput
from r1zero.types import Outcome, Score

# Its worker processes are started by the package.
pytestmark = pytest.mark.ranks

HOSTILE = r"\boxed{\prod_{n=1}^{9999} n^n}"  # sympy works it out in C, and never ends
# A function of a user's own, whose module starts a thread; it tells where it runs.
THREADED = """
import os, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
imported_by = os.getpid()
def told(cases):
    return [float(imported_by if "imported" in case.response else os.getpid()) for case in cases]
"""


@pytest.fixture
def executor() -> Iterator[RewardExecutor]:
    config = RewardConfig(names=["acc"], weights=[1.0], workers=3, deadline_seconds=10)
    with RewardExecutor(config) as running:
        wait_until_ready(running)
        yield running


def wait_until_ready(executor: RewardExecutor) -> None:
    def ready() -> bool:
        executor.poll(0.1)
        return executor.pool.ready

    wait_until(ready)


def wait_for_another(executor: RewardExecutor, replaced: int) -> None:
    """Wait until so many workers were replaced since the start."""

    def happened() -> bool:
        executor.poll(0.1)
        return executor.pool.replaced == replaced

    wait_until(happened)
    wait_until_ready(executor)


def submit(executor: RewardExecutor, key: str, response: str) -> None:
    executor.submit(key, 0, 1, RewardInput("q", response, "5", 1, limit=100, truncated=False))


def status(pid: int, key: str) -> str:
    """A line of what Linux tells about a process; "" when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return found[0]


def server_of(executor: RewardExecutor) -> int:
    """The process id of the parent that all workers have."""
    parents = {int(status(pid, "PPid")) for pid in executor.pool.processes}
    assert len(parents) == 1
    assert parents != {os.getpid()}
    return parents.pop()


def pipes_of(pid: int) -> set[str]:
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return {link for link in links if link.startswith(("pipe:", "socket:"))}


def has_ended(pid: int) -> bool:
    return status(pid, "State") in ("", "Z")


def test_replaced_workers_come_from_the_same_process(executor: RewardExecutor) -> None:
    server = server_of(executor)
    for replaced in (1, 2, 3, 4):
        os.kill(executor.pool.processes[0], signal.SIGKILL)
        wait_for_another(executor, replaced)
    assert server_of(executor) == server
    assert len(set(executor.pool.processes)) == 3
    assert status(server, "Threads") == "1"


def test_no_worker_holds_a_pipe_of_another(executor: RewardExecutor) -> None:
    os.kill(executor.pool.processes[0], signal.SIGKILL)
    wait_for_another(executor, 1)  # forked while the others run
    processes = [server_of(executor), *executor.pool.processes]
    held = [pipes_of(pid) for pid in processes]
    assert [len(pipes) for pipes in held[1:]] == [2, 2, 2]
    assert len(set.union(*held)) == sum(map(len, held))


def test_own_functions_are_imported_by_workers_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(THREADED)
    names = ["acc", f"{path}:told"]
    config = RewardConfig(names=names, weights=[1.0, 1.0], workers=1, deadline_seconds=10)
    with RewardExecutor(config) as executor:
        submit(executor, "imported", "imported")
        submit(executor, "called", "called")
        found = executor.collect(["imported", "called"])
        pids = [scores["mine.told"].value for [scores] in found.values()]
        assert pids == executor.pool.processes * 2
        assert status(int(pids[0]), "Threads") == "2"
        assert status(server_of(executor), "Threads") == "1"


def test_comparing_answers_needs_neither_the_configuration_nor_what_starts_threads() -> None:
    code = (
        "import sys; from r1zero.reward import fork_server; fork_server.warm_up(['acc', 'format']); "
        "print(*sys.modules)"
    )
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "r1zero.reward.math.grade" in modules
    assert not {"numpy", "torch", "r1zero.config.schema"} & set(modules)


def test_fork_server_that_is_killed_is_replaced(executor: RewardExecutor) -> None:
    server = server_of(executor)
    workers = executor.pool.processes
    submit(executor, "in hand", HOSTILE)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: all(map(has_ended, workers)))
    executor.poll(0.1)
    submit(executor, "next", boxed(5))
    found = executor.collect(["in hand", "next"])
    crash = Score(-1.0, Outcome.CRASH, "its process ended with status -9")
    assert [scores["acc"] for [scores] in found.values()] == [crash, Score(1.0, Outcome.RIGHT)]
    wait_until_ready(executor)
    assert server_of(executor) != server


def test_stopped_fork_server_does_not_outlive_the_pool(
    executor: RewardExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1zero.reward.fork_client.END_SECONDS", 0.1)
    processes = [server_of(executor), *executor.pool.processes]
    submit(executor, "in hand", HOSTILE)
    os.kill(processes[0], signal.SIGSTOP)
    executor.close()
    wait_until(lambda: all(map(has_ended, processes)))
