"""The judge with real worker processes: verdicts, deadlines, deaths, order, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1zero.batch import Outcome, Score
from r1zero.reward import judge as judge_module
from r1zero.reward.judge import ITEMS_AT_WORKER, Judge
from r1zero.reward.rules import AccuracyValues

GOOD = r"<think>a</think><answer>\boxed{%s}</answer>"
HOSTILE = r"\boxed{9^{9^{9^{9}}}}"  # runs in C and never ends


def processes(judge: Judge) -> list[int]:
    return [worker.process.pid for worker in judge._workers]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_ready(judge: Judge) -> None:
    limit = time.monotonic() + 60
    while not all(worker.ready for worker in judge._workers):
        assert time.monotonic() < limit
        judge.poll(0.1)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(["acc", "format"], [0.75, 0.25], workers=1, deadline_seconds=1.5) as running:
        yield running


def test_scores_and_weights(judge: Judge) -> None:
    judge.submit("right", GOOD % r"\frac{1}{2}", "0.5")
    judge.submit("wrong", GOOD % "2", "0.5")
    judge.submit("unformatted", r"\boxed{0.5}", "0.5")
    judge.submit("none", "I do not know", "0.5")
    scores = judge.collect(["none", "right", "unformatted", "wrong"])
    assert list(scores) == ["none", "right", "unformatted", "wrong"]
    assert scores["right"] == {"acc": Score(1.0, Outcome.RIGHT), "format": Score(1.0, Outcome.RIGHT)}
    assert scores["wrong"] == {"acc": Score(-1.0, Outcome.WRONG), "format": Score(1.0, Outcome.RIGHT)}
    assert scores["none"] == {"acc": Score(-1.0, Outcome.NO_ANSWER), "format": Score(0.0, Outcome.WRONG)}
    rewards = {key: judge.reward(each) for key, each in scores.items()}
    assert rewards == {"right": 1.0, "wrong": -0.5, "unformatted": 0.75, "none": -0.75}


def test_deadline_ends_an_item_and_spares_those_behind_it(judge: Judge) -> None:
    wait_until_ready(judge)
    before = judge.replaced
    start = time.monotonic()
    judge.submit("hostile", HOSTILE, "5")
    for number in range(5):
        judge.submit(number, GOOD % number, "3")
    hostile = judge.collect(["hostile"])["hostile"]
    elapsed = time.monotonic() - start
    assert hostile == {"acc": Score(-1.0, Outcome.TIMEOUT), "format": Score(0.0, Outcome.TIMEOUT)}
    assert 1.4 < elapsed < 2.5
    values = [scores["acc"].value for scores in judge.collect(range(5)).values()]
    assert values == [-1.0, -1.0, -1.0, 1.0, -1.0]
    assert judge.replaced == before + 1


def test_time_not_polled_does_not_count_against_waiting_items(judge: Judge) -> None:
    wait_until_ready(judge)
    for number in range(ITEMS_AT_WORKER):
        judge.submit(number, r"\boxed{%d}" % number, "7")
    time.sleep(2 * judge.deadline_seconds + 2.5)  # the engine decodes, nobody looks
    scores = judge.collect(range(ITEMS_AT_WORKER))
    assert {each["acc"].outcome for each in scores.values()} == {Outcome.RIGHT, Outcome.WRONG}


def test_killed_worker_costs_one_item(judge: Judge) -> None:
    wait_until_ready(judge)
    judge.submit("hostile", HOSTILE, "5")
    judge.submit("next", r"\boxed{5}", "5")
    time.sleep(0.3)
    os.kill(processes(judge)[0], signal.SIGKILL)
    scores = judge.collect(["hostile", "next"])
    assert scores["hostile"]["acc"] == Score(-1.0, Outcome.CRASH)
    assert scores["next"]["acc"] == Score(1.0, Outcome.RIGHT)


def test_stopped_worker_is_replaced(judge: Judge) -> None:
    wait_until_ready(judge)
    os.kill(processes(judge)[0], signal.SIGSTOP)
    judge.submit("stopped", r"\boxed{5}", "5")
    judge.submit("next", r"\boxed{5}", "5")
    scores = judge.collect(["stopped", "next"])
    assert scores["stopped"]["acc"].outcome is Outcome.TIMEOUT
    assert scores["next"]["acc"].outcome is Outcome.RIGHT


def test_odd_text_harms_nobody(judge: Judge) -> None:
    texts = ["\x00\ud800\u202e", "\\boxed{" * 100_000, "{" * 2_000_000, r"\boxed{" + "(" * 900 + "}"]
    for number, text in enumerate(texts):
        judge.submit(number, text, "5")
    judge.submit("sane", r"\boxed{5}", "5")
    scores = judge.collect([*range(len(texts)), "sane"])
    assert all(scores[number]["acc"].value == -1.0 for number in range(len(texts)))
    assert scores["sane"]["acc"].outcome is Outcome.RIGHT


def test_order_and_number_of_workers_do_not_change_scores(judge: Judge) -> None:
    golds = ["3", r"\frac{1}{2}", r"2\sqrt{3}", "(x+1)^2", "(1,2)"]
    answers = ["3", "0.5", r"\sqrt{12}", "x^2+2x+1", "(2,1)", "no"]
    items = {(gold, answer): (GOOD % answer, gold) for gold in golds for answer in answers}
    with Judge(["acc", "format"], [0.75, 0.25], workers=2, deadline_seconds=20) as other:
        for key in items:
            judge.submit(key, *items[key])
        for key in reversed(items):
            other.submit(key, *items[key])
        assert judge.collect(items) == other.collect(items)


def test_work_goes_on_between_polls(judge: Judge) -> None:
    wait_until_ready(judge)
    for number in range(100):
        judge.submit(number, r"\boxed{%d}" % number, "7")
    assert judge._pending, "submitting waits for verdicts"
    limit = time.monotonic() + 30
    while judge._pending and time.monotonic() < limit:
        time.sleep(0.01)  # a decode step
        judge.poll()
    assert len(judge.collect(range(100))) == 100 and time.monotonic() < limit


def test_memory_of_a_worker_is_bounded() -> None:
    with Judge(["acc"], [1.0], workers=1, deadline_seconds=4, memory_bytes=96 << 20) as small:
        wait_until_ready(small)
        status = Path(f"/proc/{processes(small)[0]}/status")
        small.submit("huge", r"\boxed{2^{2^{34}}}", "5x")  # takes 400 MiB within 4 s if it may
        peaks = []
        while "huge" in small._pending:
            small.poll(0.02)
            lines = status.read_text().splitlines() if status.exists() else []
            peaks += [int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")]
        small.submit("sane", r"\boxed{5}", "5")
        scores = small.collect(["huge", "sane"])
    assert 50 < max(peaks) < 250  # MiB; 75 of them are sympy
    assert scores["huge"]["acc"].value == -1.0
    assert scores["sane"]["acc"].outcome is Outcome.RIGHT


def test_constructor_does_not_wait_and_close_leaves_no_process() -> None:
    start = time.monotonic()
    judge = Judge(["acc"], [1.0], workers=2, deadline_seconds=5, accuracy=AccuracyValues(wrong=-0.5))
    assert time.monotonic() - start < 0.5
    judge.submit("wrong", r"\boxed{4}", "5")
    assert judge.collect(["wrong"])["wrong"]["acc"] == Score(-0.5, Outcome.WRONG)
    judge.submit("hostile", HOSTILE, "5")
    pids = processes(judge)
    judge.close()
    assert not any(map(is_alive, pids))


def test_workers_end_with_their_parent() -> None:
    program = (
        "from r1zero.reward.judge import Judge\n"
        "judge = Judge(['acc'], [1.0], workers=2, deadline_seconds=1)\n"
        "judge.submit(0, r'\\boxed{1}', '1'); judge.collect([0])\n"
        f"judge.submit(1, {HOSTILE!r}, '5'); judge.poll(0.1)\n"
        "print(*(worker.process.pid for worker in judge._workers), flush=True)\n"
        "import os; os._exit(0)\n"
    )
    root = Path(judge_module.__file__).parents[2]
    output = subprocess.check_output([sys.executable, "-c", program], cwd=root, text=True)
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    limit = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    """Tell whether a process that is not ours exists and is no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_workers_ignore_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    with Judge(["acc"], [1.0], workers=1) as judge:
        judge.submit(0, r"\boxed{\sqrt{12}}", r"2\sqrt{3}")
        assert judge.collect([0])[0]["acc"].outcome is Outcome.RIGHT


def test_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1zero.reward.judge._PROGRAM", "raise SystemExit(7)")
    with Judge(["acc"], [1.0], workers=1) as judge, pytest.raises(RuntimeError, match="status 7"):
        judge.submit(0, r"\boxed{1}", "1")
        judge.collect([0])


def test_checker_that_errs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = "from r1zero.reward import worker; worker.SELF_TEST.append(('1', r'\\boxed{2}', True)); "
    program = judge_module._PROGRAM.replace("from r1zero.reward.worker", lie + "from r1zero.reward.worker")
    monkeypatch.setattr("r1zero.reward.judge._PROGRAM", program)
    with Judge(["acc"], [1.0], workers=1) as judge, pytest.raises(RuntimeError, match="self-test.*is 1"):
        judge.submit(0, r"\boxed{1}", "1")
        judge.collect([0])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="verifier_weight: 1 weights for 2"):
        Judge(["acc", "format"], [1.0])
    with pytest.raises(ValueError, match="at least 1 worker"):
        Judge(["acc"], [1.0], workers=0)
    with pytest.raises(ValueError, match="no scorer 'acu'"):
        Judge(["acu"], [1.0])
