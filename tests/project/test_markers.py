"""The marks that tests get: who starts processes is found through helpers and fixtures."""

from __future__ import annotations

import math
import multiprocessing
import subprocess

from support.markers import marks_of, starts_processes
from support.multiproc import run_ranks
from support.tool import run_here
from support.worlds import run


def body() -> None:
    run_ranks(print, 1)


def helper() -> None:
    def inner() -> None:
        body()

    inner()


def program() -> None:
    subprocess.run(["true"], check=True)


FORK = multiprocessing.get_context("fork")


def forked() -> None:
    FORK.Process().start()


class Runner:
    def start(self) -> None:
        program()


def with_a_class() -> None:
    Runner().start()


def plain() -> float:
    return math.sqrt(2)


def test_what_starts_processes_is_found_through_helpers() -> None:
    for function in (body, helper, program, forked, with_a_class, run, run_ranks):
        assert starts_processes(function), function
    for function in (plain, run_here):
        assert not starts_processes(function), function


def test_a_test_without_processes_is_fast() -> None:
    assert marks_of(plain, [], [], []) == {"fast"}
    assert marks_of(plain, [plain], ["home"], []) == {"fast"}
    assert marks_of(plain, [], [], ["slow"]) == marks_of(plain, [], [], ["ranks"]) == set()
    assert marks_of(helper, [], [], []) == {"ranks"}
    assert marks_of(plain, [helper], ["trained"], []) == {"ranks"}
    assert marks_of(plain, [helper], ["browser"], []) == {"ranks", "browser"}
