"""The reward executor with real worker processes: verdicts, deadlines, deaths, groups, nothing left
behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.boxed import boxed
from support.patience import wait_until

from r1zero.observe.sample_summary import summarize
from r1zero.reward import fork_server
from r1zero.reward.config import RewardConfig
from r1zero.reward.executor import RewardExecutor
from r1zero.reward.failure_limit import WINDOW, FailureGuard
from r1zero.reward.pool import ITEMS_AT_WORKER
from r1zero.reward.types import RewardInput
from r1zero.types import Group, Outcome, Prompt, Sample, SampleSummary, Score

# Its worker processes are started by the package.
pytestmark = pytest.mark.ranks

GOOD = r"<think>a</think><answer>\boxed{%s}</answer>"
HOSTILE = r"\boxed{\prod_{n=1}^{9999} n^n}"  # sympy works it out in C, and never ends
ONE = RewardConfig(names=["acc"], weights=[1.0], workers=1, deadline_seconds=1.5)
TWO = replace(ONE, names=["acc", "format"], weights=[0.75, 0.25])


def submit(
    executor: RewardExecutor,
    key: Hashable,
    response: str,
    answer: str,
    member: int = 0,
    size: int = 1,
    tokens: int = 1,
) -> None:
    executor.submit(
        key, member, size, RewardInput("q", response, answer, tokens, limit=100, truncated=False)
    )


def collect(executor: RewardExecutor, keys: Sequence[Hashable]) -> dict[Hashable, dict[str, Score]]:
    """Scores of groups of one."""
    return {key: scores for key, [scores] in executor.collect(keys).items()}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_ready(executor: RewardExecutor) -> None:
    def ready() -> bool:
        executor.poll(0.1)
        return executor.pool.ready

    wait_until(ready)


@pytest.fixture(scope="module")
def executor() -> Iterator[RewardExecutor]:
    with RewardExecutor(TWO) as running:
        yield running


def test_scores_and_weights(executor: RewardExecutor) -> None:
    submit(executor, "right", GOOD % r"\frac{1}{2}", "0.5")
    submit(executor, "wrong", GOOD % "2", "0.5")
    submit(executor, "unformatted", r"\boxed{0.5}", "0.5")
    submit(executor, "none", "I do not know", "0.5")
    scores = collect(executor, ["none", "right", "unformatted", "wrong"])
    assert list(scores) == ["none", "right", "unformatted", "wrong"]
    assert scores["right"] == {
        "acc": Score(1.0, Outcome.RIGHT),
        "format": Score(1.0, Outcome.RIGHT),
    }
    assert scores["wrong"] == {
        "acc": Score(-1.0, Outcome.WRONG),
        "format": Score(1.0, Outcome.RIGHT),
    }
    assert scores["none"] == {
        "acc": Score(-1.0, Outcome.NO_ANSWER),
        "format": Score(0.0, Outcome.WRONG),
    }
    rewards = {key: executor.reward(each) for key, each in scores.items()}
    assert rewards == {"right": 1.0, "wrong": -0.5, "unformatted": 0.75, "none": -0.75}


def test_deadline_ends_one_scorer_and_spares_the_rest(executor: RewardExecutor) -> None:
    wait_until_ready(executor)
    before = executor.pool.replaced
    start = time.monotonic()
    submit(executor, "hostile", f"<think>a</think><answer>{HOSTILE}</answer>", "5")
    for number in range(5):
        submit(executor, number, GOOD % number, "3")

    def ended() -> bool:
        executor.poll()
        return executor.pool.replaced > before

    wait_until(ended)
    assert time.monotonic() - start > 1.4
    hostile = collect(executor, ["hostile"])["hostile"]
    assert hostile["acc"] == Score(-1.0, Outcome.TIMEOUT, "no score within 1.5 s")
    assert hostile["format"] == Score(1.0, Outcome.RIGHT), "format does not fail with acc"
    values = [scores["acc"].value for scores in collect(executor, range(5)).values()]
    assert values == [-1.0, -1.0, -1.0, 1.0, -1.0]
    assert executor.pool.replaced == before + 1


def test_time_not_polled_does_not_count_against_waiting_items(executor: RewardExecutor) -> None:
    wait_until_ready(executor)
    for number in range(ITEMS_AT_WORKER):
        # more than a pipe holds
        submit(executor, number, boxed(number) + " " * 50_000, "7")
    time.sleep(2 * executor.pool.deadline_seconds + 1.5)  # the engine decodes, nobody looks
    scores = collect(executor, range(ITEMS_AT_WORKER))
    assert {each["acc"].outcome for each in scores.values()} == {Outcome.RIGHT, Outcome.WRONG}


def test_killed_worker_costs_one_score(executor: RewardExecutor) -> None:
    wait_until_ready(executor)
    submit(executor, "hostile", HOSTILE, "5")
    submit(executor, "next", r"\boxed{5}", "5")
    time.sleep(0.3)
    os.kill(executor.pool.processes[0], signal.SIGKILL)
    scores = collect(executor, ["hostile", "next"])
    assert scores["hostile"]["acc"] == Score(
        -1.0, Outcome.CRASH, "its process ended with status -9"
    )
    assert scores["hostile"]["format"].outcome is Outcome.WRONG
    assert scores["next"]["acc"] == Score(1.0, Outcome.RIGHT)


def test_stopped_worker_is_replaced(executor: RewardExecutor) -> None:
    wait_until_ready(executor)
    os.kill(executor.pool.processes[0], signal.SIGSTOP)
    submit(executor, "stopped", r"\boxed{5}", "5")
    submit(executor, "next", r"\boxed{5}", "5")
    scores = collect(executor, ["stopped", "next"])
    assert scores["stopped"]["acc"].outcome is Outcome.TIMEOUT
    assert scores["next"]["acc"].outcome is Outcome.RIGHT


def test_odd_text_harms_nobody(executor: RewardExecutor) -> None:
    texts = [
        "\x00\ud800\u202e",
        "\\boxed{" * 100_000,
        "{" * 2_000_000,
        r"\boxed{" + "(" * 900 + "}",
    ]
    for number, text in enumerate(texts):
        submit(executor, number, text, "5")
    submit(executor, "sane", r"\boxed{5}", "5")
    scores = collect(executor, [*range(len(texts)), "sane"])
    assert all(scores[number]["acc"].value == -1.0 for number in range(len(texts)))
    assert scores["sane"]["acc"].outcome is Outcome.RIGHT


def test_order_and_number_of_workers_do_not_change_scores(executor: RewardExecutor) -> None:
    golds = ["3", r"\frac{1}{2}", r"2\sqrt{3}", "(x+1)^2", "(1,2)"]
    answers = ["3", "0.5", r"\sqrt{12}", "x^2+2x+1", "(2,1)", "no"]
    items = {(gold, answer): (GOOD % answer, gold) for gold in golds for answer in answers}
    with RewardExecutor(replace(TWO, workers=2, deadline_seconds=20)) as other:
        for key in items:
            submit(executor, key, *items[key])
        for key in reversed(items):
            submit(other, key, *items[key])
        assert executor.collect(items) == other.collect(items)


def test_work_goes_on_between_polls(executor: RewardExecutor) -> None:
    wait_until_ready(executor)
    for number in range(100):
        submit(executor, number, boxed(number), "7")
    assert not executor.is_done(99), "submitting waits for verdicts"

    def done() -> bool:  # asked between decode steps
        executor.poll()
        return all(executor.is_done(number) for number in range(100))

    wait_until(done)
    assert len(executor.collect(range(100))) == 100


def test_memory_of_a_worker_is_bounded() -> None:
    small_config = replace(ONE, deadline_seconds=4, worker_memory_megabytes=96)
    with RewardExecutor(small_config) as small:
        wait_until_ready(small)
        status = Path(f"/proc/{small.pool.processes[0]}/status")
        submit(small, "huge", r"\boxed{2^{2^{34}}}", "5x")  # takes 400 MiB within 4 s if it may
        peaks = []
        while not small.is_done("huge"):
            small.poll(0.02)
            lines = status.read_text().splitlines() if status.exists() else []
            peaks += [int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")]
        submit(small, "sane", r"\boxed{5}", "5")
        scores = collect(small, ["huge", "sane"])
    assert 50 < max(peaks) < 250  # MiB; 75 of them are sympy
    assert scores["huge"]["acc"].value == -1.0
    assert scores["sane"]["acc"].outcome is Outcome.RIGHT


def test_constructor_does_not_wait_and_close_leaves_no_process() -> None:
    executor = RewardExecutor(
        replace(ONE, workers=2, deadline_seconds=5, settings={"acc": {"wrong": -0.5}})
    )
    assert not executor.pool.ready
    submit(executor, "wrong", r"\boxed{4}", "5")
    assert collect(executor, ["wrong"])["wrong"]["acc"] == Score(-0.5, Outcome.WRONG)
    submit(executor, "hostile", HOSTILE, "5")
    pids = executor.pool.processes
    executor.close()
    assert not any(map(is_alive, pids))


def test_workers_end_with_their_parent() -> None:
    program = (
        "from r1zero.reward.config import RewardConfig\nfrom r1zero.reward.types import RewardInput\n"
        "from r1zero.reward.executor import RewardExecutor\n"
        "one = RewardConfig(names=['acc'], weights=[1.0], workers=2, deadline_seconds=1)\n"
        "executor = RewardExecutor(one)\n"
        "while not executor.pool.ready: executor.poll(0.1)\n"
        f"executor.submit(1, 0, 1, RewardInput('', {HOSTILE!r}, '5', 1, 9, False)); "
        "executor.poll(0.1)\n"
        "print(*executor.pool.processes, flush=True)\n"
        "import os, signal\n"
        "os.kill(executor.pool.processes[1], signal.SIGSTOP)  # reads no end of a pipe\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(fork_server.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)))


def is_running(pid: int) -> bool:
    """Tell whether a process that is not ours exists and is no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_nothing_in_the_current_folder_hides_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    with RewardExecutor(ONE) as executor:
        submit(executor, 0, r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
        assert collect(executor, [0])[0]["acc"].outcome is Outcome.RIGHT


def test_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1zero.reward.fork_client.PROGRAM", "raise SystemExit(7)")
    with (
        RewardExecutor(ONE) as executor,
        pytest.raises(RuntimeError, match="status 7"),
    ):
        submit(executor, 0, r"\boxed{1}", "1")
        executor.collect([0])


def test_worker_that_hangs_at_its_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1zero.reward.fork_client.PROGRAM", "import time; time.sleep(60)")
    with (
        RewardExecutor(ONE, start_seconds=0.5) as executor,
        pytest.raises(RuntimeError, match="not ready after"),
    ):
        submit(executor, 0, r"\boxed{1}", "1")
        executor.collect([0])


def test_checker_that_errs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = "from r1zero.reward import worker; worker.SELF_TEST.append(('1', r'\\boxed{2}', True)); "
    program = fork_server.PROGRAM.replace("from r1zero", lie + "from r1zero", 1)
    monkeypatch.setattr("r1zero.reward.fork_client.PROGRAM", program)
    with (
        RewardExecutor(ONE) as executor,
        pytest.raises(RuntimeError, match="self-test.*is 1"),
    ):
        submit(executor, 0, r"\boxed{1}", "1")
        executor.collect([0])


# -- groups and custom scorers ---

CUSTOM = r"""
import os, time
def behave(cases):
    what = cases[0].response
    if "raise" in what: raise KeyError("no such key")
    if "die" in what: os._exit(5)
    if "hang" in what: time.sleep(100)
    if "short" in what: return [1.0]
    if "greedy" in what: return [float(len(bytearray(1 << 32)))] * len(cases)
    print("noise between messages")
    return [case.tokens + 100 * bool(case.right) for case in cases]
"""


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardExecutor]:
    path = tmp_path_factory.mktemp("custom") / "mine.py"
    path.write_text(CUSTOM)
    config = RewardConfig(
        names=[f"{path}:behave", "acc", "length", "overlong"],
        weights=[0.1, 1, 2, 3],
        workers=1,
        deadline_seconds=1,
        worker_memory_megabytes=256,
    )
    with RewardExecutor(config) as running:
        yield running


def test_scorers_of_a_group_see_all_of_it_with_the_verdicts(shaped: RewardExecutor) -> None:
    answers = [("5", 10), ("6", 30), ("5", 50)]
    for member in (2, 0, 1):  # they end in any order
        submit(shaped, "g", boxed(answers[member][0]), "5", member, 3, answers[member][1])
    members = shaped.collect(["g"])["g"]
    assert [list(scores) for scores in members] == [
        ["mine.behave", "acc", "length", "overlong"]
    ] * 3
    assert [scores["mine.behave"].value for scores in members] == [110, 30, 150]
    assert [scores["length"].value for scores in members] == [0.5, 0.0, -0.5]
    assert shaped.reward(members[0]) == pytest.approx(11 + 1 + 1)


@pytest.mark.parametrize(
    ("response", "outcome", "why"),
    [
        ("raise", Outcome.CRASH, "KeyError: 'no such key'"),
        ("die", Outcome.CRASH, "its process ended with status 5"),
        ("hang", Outcome.TIMEOUT, "no score within 1 s"),
        ("short", Outcome.CRASH, "returned 1 values for 2 responses"),
        ("greedy", Outcome.CRASH, "out of the memory that reward.worker_memory_megabytes allows"),
    ],
)
def test_custom_scorer_that_fails_fails_alone(
    shaped: RewardExecutor, response: str, outcome: Outcome, why: str
) -> None:
    for member, answer in enumerate("56"):
        submit(shaped, response, f"{response} {boxed(answer)}", "5", member, 2, tokens=10 + member)
    members = shaped.collect([response])[response]
    for scores in members:
        assert scores["mine.behave"].value == 0 and scores["mine.behave"].outcome is outcome
        assert why in scores["mine.behave"].why
    assert [scores["acc"].value for scores in members] == [1, -1]
    assert [scores["length"].value for scores in members] == [0.5, -0.5]


def test_what_a_scorer_logs_is_in_the_log_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import logging\ndef odd(cases):\n"
        "    log = logging.getLogger('r1zero')\n"
        "    for _ in range(30): log.warning('odd: ' + cases[0].response * 999)\n"
        "    return [0.0]\n"
    )
    monkeypatch.setattr(logging.getLogger("r1zero"), "propagate", True)
    with RewardExecutor(replace(TWO, names=[f"{path}:odd", "acc"])) as executor:
        submit(executor, 0, r"\boxed{5}", "5")
        assert collect(executor, [0])[0]["acc"].outcome is Outcome.RIGHT
    lines = [record.getMessage() for record in caplog.records if record.name == "r1zero"]
    assert len(lines) == 20
    assert all(line.startswith("reward worker: odd: \\boxed{5}") for line in lines)
    assert max(map(len, lines)) < 700


def test_custom_scorer_alone_needs_no_mathematics(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import sys\ndef loaded(cases): return [float('sympy' in sys.modules)] * len(cases)\n"
    )
    with RewardExecutor(replace(ONE, names=[f"{path}:loaded"])) as executor:
        submit(executor, 0, "a", "b")
        assert collect(executor, [0])[0]["mine.loaded"].value == 0


# -- the rate of failures ---


def summary(good: int, bad: int) -> SampleSummary:
    """What a step of good and failed samples amounts to."""
    scores = [Score(1.0, Outcome.RIGHT)] * good + [
        Score(-1.0, Outcome.TIMEOUT, "no score within 1 s")
    ] * bad
    nothing = np.zeros(0, np.int32)
    samples = [Sample(nothing, nothing, False, 0, {"acc": score}, score.value) for score in scores]
    return summarize([Group(0, Prompt(0, "", nothing, ""), samples)])


def test_guard_stops_a_run_at_too_many_failures_in_the_window() -> None:
    guard = FailureGuard(0.05)
    for _ in range(5):
        guard.check(summary(0, 5))  # 25 of 25: a tiny run is not stopped
    said = "26 of the last 26 responses, 26 times with `acc: no score within 1 s`"
    with pytest.raises(RuntimeError, match=said):
        guard.check(summary(0, 1))


def test_guard_forgets_old_steps_and_keeps_its_rate() -> None:
    guard = FailureGuard(0.05)
    for _ in range(100):
        guard.check(summary(95, 5))
    guard.check(summary(2 * WINDOW, 0))
    guard.check(summary(0, 50))  # of 1050
    with pytest.raises(RuntimeError, match="reward.max_failure_rate 0.05"):
        guard.check(summary(0, 3))
    with pytest.raises(RuntimeError):
        FailureGuard(0.0).check(summary(1000, 1))
    FailureGuard(1.0).check(summary(0, 1000))
