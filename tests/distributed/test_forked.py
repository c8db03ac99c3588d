"""Ranks that are forked from one process: what they have of it, and how they end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from support.patience import wait_until

from r1zero.distributed import shared_imports
from r1zero.distributed.forked import fork
from r1zero.distributed.spawn import FORWARDED, Ranks, forward_signals


def sleeps() -> int:
    signal.pause()
    return 0


def fails() -> int:
    raise ValueError("as a fault of ours")


def test_a_rank_has_an_environment_and_a_session_of_its_own(tmp_path: Path) -> None:
    def tell() -> int:
        (tmp_path / "said").write_text(f"{os.environ['RANK']} {os.getsid(0) == os.getpid()}")
        return 75

    assert fork(tell, {"RANK": "3"}).wait() == 75
    assert (tmp_path / "said").read_text() == "3 True"
    assert os.environ.get("RANK") != "3"


def test_what_is_raised_is_told_and_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert fork(fails, {}).wait() == 1
    assert "ValueError: as a fault of ours" in capfd.readouterr().err


def test_the_code_of_a_signal_is_that_of_a_shell() -> None:
    """And a rank forwards no signals, as its parent does."""
    before = {number: signal.getsignal(number) for number in FORWARDED}
    ranks = Ranks()
    try:
        forward_signals(ranks)
        ranks.start(lambda environment: fork(sleeps, environment), [{}, {}])
        os.kill(os.getpid(), signal.SIGTERM)
        assert ranks.wait() == 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signals_that_are_ignored_are_ignored_by_ranks() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        rank = fork(lambda: int(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN), {})
        assert rank.wait() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    def parent() -> int:
        rank = fork(sleeps, {})
        (tmp_path / "pid").symlink_to(str(rank.pid))  # a link is there whole or not at all
        return sleeps()

    killed = fork(parent, {})
    wait_until((tmp_path / "pid").is_symlink)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    status = Path("/proc") / os.readlink(tmp_path / "pid") / "status"
    wait_until(lambda: not status.exists() or "\nState:\tZ" in status.read_text())


@pytest.mark.parametrize(
    ("backend", "cuda", "torch_npu", "all_of_it"),
    [
        (None, None, False, True),
        ("gloo", "12.8", True, True),
        (None, "12.8", False, False),
        (None, None, True, False),
        ("hccl", None, True, False),
    ],
)
def test_what_opens_devices_is_left_to_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
    backend: str | None,
    cuda: str | None,
    torch_npu: bool,
    all_of_it: bool,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = {"torch_npu": object() if torch_npu else None}
    monkeypatch.setattr(shared_imports.importlib.util, "find_spec", found.get)
    assert shared_imports.is_surely_on_cpu(backend) == all_of_it
