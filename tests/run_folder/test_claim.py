"""One run at a time in a folder: who is refused, who takes over, and nothing is lost or mixed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
from support.multiproc import DEVICE
from support.patience import LONG, wait_until

from r1zero.checkpoint import manifest, progress, store
from r1zero.checkpoint.progress import CheckpointInfo, TrainerState
from r1zero.distributed import identity
from r1zero.distributed.groups import World
from r1zero.distributed.identity import Identity
from r1zero.distributed.launch import Launch
from r1zero.errors import BadInput
from r1zero.preflight.found import look
from r1zero.preflight.opening import open_run
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import Run, complete
from r1zero.run_folder import claim, owner
from r1zero.run_folder.claim import take
from r1zero.run_folder.folder import append_line
from r1zero.run_folder.owner import check_free, newest

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every 50 ms, and two seconds of silence."""
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claim, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(claim, "CONFIRM_SECONDS", 0.02)
    monkeypatch.setattr(owner, "GLANCE_SECONDS", 1.0)
    monkeypatch.setattr(owner, "POLL_SECONDS", 0.01)


def said_by(folder: Path, **folders: Path) -> list[str]:
    """Take a folder for a moment; returns what that said."""
    lines: list[str] = []
    hold = take({"output_dir": folder, **folders}, lines.append)
    hold.release()
    return [*lines, *hold.said]


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as error:
        take({"output_dir": folder}, print)
    return str(error.value)


# -- who is refused, who takes over ---------------------------------------------------------------


def test_the_second_is_told_of_the_first_until_it_has_ended(tmp_path):
    folder = tmp_path / "run"
    first = take({"output_dir": folder}, print)
    sentence = refusal(folder)
    assert f"output_dir: another run writes into {folder}: process {os.getpid()} on " in sentence
    assert time.strftime("%Y-%m-%d %H:") in sentence and "name another folder" in sentence
    assert check_free("output_dir", folder) == [sentence]
    assert "to which" in check_free("actor_rollout.save", folder / "checkpoints")[0]
    (tmp_path / "link").symlink_to(folder)
    assert "another run writes" in refusal(tmp_path / "link"), "another name of the same folder"
    assert "another run writes" in refusal(tmp_path), "what is around it might be moved with it"
    first.check()
    first.release()
    assert check_free("output_dir", folder) == [] and said_by(folder) == []


def test_two_run_folders_do_not_share_a_folder_of_checkpoints(tmp_path):
    save = tmp_path / "save"
    first = take({"output_dir": tmp_path / "a", "actor_rollout.save": save}, print)
    with pytest.raises(BadInput, match="actor_rollout.save: another run writes into .*: process"):
        take({"output_dir": tmp_path / "b", "actor_rollout.save": save}, print)
    assert said_by(tmp_path / "b") == [], "what the refused one had taken is free again"
    first.release()
    assert said_by(tmp_path / "b", save=save) == []


def leave_without_a_word(folder: Path) -> Identity:
    """A process takes a folder and is killed; returns who that was."""

    def die() -> None:
        take({"output_dir": folder}, print)
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=die)
    process.start()
    process.join()
    return newest(folder).owner


@pytest.mark.parametrize("number", ["free", "used again", "zombie"])
def test_the_folder_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path, number):
    dead = leave_without_a_word(tmp_path)
    entry = newest(tmp_path)
    if number == "used again":
        entry.path.write_text(replace(dead, pid=os.getpid()).text())
    elif number == "zombie":  # killed, and its parent has not looked yet
        child = subprocess.Popen(["sleep", "60"])
        ticks = identity._state(child.pid)[1]
        entry.path.write_text(replace(dead, pid=child.pid, ticks=ticks).text())
        assert "another run writes" in refusal(tmp_path)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    [line] = said_by(tmp_path)
    assert time.monotonic() - began < claim.SILENCE_SECONDS / 2, "nobody waited for silence"
    assert "is taken over from process" in line and "ended without giving it back" in line
    assert said_by(tmp_path) == []


def as_elsewhere(folder: Path) -> Path:
    """Let the folder's owner be one on another machine; returns its file."""
    entry = newest(folder)
    entry.path.write_text(replace(entry.owner, host="node7", machine="another").text())
    return entry.path


@pytest.mark.parametrize("hours", [-5, 0, 5], ids=["clock behind", "clocks agree", "clock ahead"])
def test_a_run_on_another_host_is_known_by_its_signs_of_life(tmp_path, quick, hours):
    leave_without_a_word(tmp_path)
    path = as_elsewhere(tmp_path)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            moment = time.time() + 3600 * hours
            os.utime(path, (moment, moment))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "process" in refusal(tmp_path) and "on node7" in refusal(tmp_path)
        assert "on node7" in check_free("output_dir", tmp_path)[0]
    finally:
        over.set()
        thread.join()
    waited, taken = said_by(tmp_path)
    assert "on node7" in waited and "cannot be seen from here" in waited and "taken over" in taken


def test_silence_for_a_glance_does_not_refuse_a_check(tmp_path, quick):
    leave_without_a_word(tmp_path)
    as_elsewhere(tmp_path)
    assert check_free("output_dir", tmp_path) == [], "a check cannot wait for long: taking it will"


def test_a_process_that_was_killed_while_it_took_the_folder_does_not_block_it(tmp_path, quick):
    (tmp_path / owner.FOLDER).mkdir()
    (tmp_path / owner.FOLDER / "0000004.json").touch()
    assert "a process that left no name" in said_by(tmp_path)[0]
    assert newest(tmp_path).number == 5


def test_who_gives_the_folder_back_while_another_is_refused_is_still_named(tmp_path):
    hold = take({"output_dir": tmp_path}, print)
    seen = newest(tmp_path)
    hold.release()
    assert f"process {os.getpid()}" in str(seen)


def test_a_requeued_job_takes_its_own_folder_from_tasks_that_linger(tmp_path, quick, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "993")
    lost: list[str] = []
    before = take({"output_dir": tmp_path}, print, lambda error: lost.append(str(error)))
    assert "another run writes" in refusal(tmp_path), "a second step of the same job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert check_free("output_dir", tmp_path) == []
    lines: list[str] = []
    after = take({"output_dir": tmp_path}, lines.append)
    assert "earlier start of this Slurm job" in lines[0]
    assert "was taken over by process" in lost[0], "the lingering one has noticed"
    with pytest.raises(BadInput, match="this run ends and writes nothing more"):
        before.check()
    before.release()
    after.check()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert "another run writes" in refusal(tmp_path), "the earlier start does not come back"
    after.release()


@pytest.mark.parametrize("fate", ["moved", "moved, and another run is there", "removed"])
def test_the_owner_notices_that_its_folder_was_taken_away(tmp_path, quick, fate):
    folder, lost = tmp_path / "run", []
    hold = take({"output_dir": folder}, print, lost.append)
    folder.rename(tmp_path / "away")
    if fate == "removed":
        for path in sorted((tmp_path / "away").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    other = take({"output_dir": folder}, print) if "another" in fate else None
    with pytest.raises(BadInput, match="run was moved or removed while this run wrote into it; "):
        hold.check()
    wait_until(lambda: lost)  # also without being asked
    hold.release()
    if other is not None:
        other.check()  # nothing of the first reaches into what is the other's now
        other.release()


def race(folder: Path, oracle: Path, together: multiprocessing.synchronize.Barrier) -> None:
    """Take the folder in the same moment as others; 0: had it, 2: refused, 9: so had another."""
    together.wait()
    try:
        hold = take({"output_dir": folder}, print)
    except BadInput:
        os._exit(2)
    with oracle.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os._exit(9)
        time.sleep(0.01)
        hold.check()
    hold.release()
    os._exit(0)


def test_of_several_that_start_in_the_same_moment_one_gets_the_folder(tmp_path):
    for _ in range(12):
        leave_without_a_word(tmp_path)  # what they find is a dead one's
        together = FORK.Barrier(5)
        arguments = tmp_path, tmp_path / "oracle", together
        processes = [FORK.Process(target=race, args=arguments) for _ in range(5)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        ends = [process.exitcode for process in processes]
        assert 0 in ends and set(ends) <= {0, 2}, ends


def test_who_looked_before_others_came_and_went_does_not_get_the_folder(tmp_path):
    for _ in range(3):
        take({"output_dir": tmp_path}, print).release()
    assert claim._make("output_dir", tmp_path, 2, identity.mine()) is None
    assert newest(tmp_path).number == 3 and newest(tmp_path).ended
    owner_now = take({"output_dir": tmp_path}, print)
    assert claim._make("output_dir", tmp_path, 2, identity.mine()) is None
    owner_now.check()
    owner_now.release()


# -- random interleavings -------------------------------------------------------------------------
#
# Contenders do what a run's controller does to its folders, with the real parts but no model: a
# checkpoint holds the list of (step, contender) that led to it. A lock of the kernel's, which the
# parts under test do not know, tells whether two contenders are in at once.


def contend(number: int, run: Run, oracle: Path, orders: Connection) -> None:
    """Take the folders, and then obey orders until one ends this process."""
    cfg = run.config
    World._build = lambda self, span: None  # no role needs a group here
    world = World(
        Launch("single", 0, 1, 0, (0,), "", 0),
        run.placement,
        DEVICE,
        timedelta(seconds=LONG),
        dist.HashStore(),
    )
    try:
        hold, opening = open_run(run, world)
    except BadInput as error:
        orders.send(("refused", str(error)))
        os._exit(2)
    lock = oracle.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    history = json.loads((opening.checkpoint / "history").read_text()) if opening.checkpoint else []
    orders.send(("in", [tuple(entry) for entry in history]))
    while (order := orders.recv()) != "stop":
        hold.check()
        if order == "step":
            history.append((history[-1][0] + 1 if history else 1, number))
            record(Path(cfg.output_dir), *history[-1])
        else:
            save(cfg.checkpoints, history, hold.check)
        orders.send((order, history[-1] if history else None))
    fcntl.flock(lock, fcntl.LOCK_UN)
    hold.release()
    orders.send(("out", None))
    os._exit(0)


def record(folder: Path, step: int, number: int) -> None:
    """What the observer keeps of a step."""
    append_line(folder / "metrics.jsonl", {"step": step, "by": number})
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / f"step_{step:06d}.parquet").write_text(str(number))


def save(store_: Path, history: list[tuple[int, int]], check: Callable[[], None]) -> None:
    """What the checkpoint manager does to save."""
    step = history[-1][0] if history else 0
    if step == 0:
        return
    partial = store.start(store_, step)
    (partial / "history").write_text(json.dumps(history))
    (partial / progress.NAME).write_text(
        CheckpointInfo(TrainerState(step), 0, 0.0, {}, "", {}, {}).text()
    )
    files = {path.name: manifest.describe(path) for path in sorted(partial.iterdir())}
    manifest.write(partial, files)
    check()
    store.publish(partial, step)


class Contender:
    """A process that contends, as the test sees it."""

    def __init__(self, number: int, run: Run, oracle: Path) -> None:
        self.orders, theirs = FORK.Pipe()
        self.number, self.steps, self.answers = number, [], []
        self.process = FORK.Process(target=contend, args=(number, run, oracle, theirs))
        self.process.start()
        theirs.close()

    def order(self, word: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was refused, or is over
            self.orders.send(word)

    def listen(self) -> None:
        """Take in what it has answered."""
        try:
            while self.orders.poll():
                kind, value = self.orders.recv()
                self.answers.append((kind, value))
                self.steps += [value] if kind == "step" else []
        except (EOFError, ConnectionResetError):
            pass

    def end(self, killed: bool) -> None:
        if killed:
            self.process.kill()
        else:
            self.order("stop")
        # one that was killed before it wrote its name is waited for: claim.SILENCE_SECONDS
        self.process.join(LONG)
        self.listen()
        expected = (0, 2, -signal.SIGKILL) if killed else (0, 2)
        assert self.process.exitcode in expected, self.process.exitcode


@pytest.mark.parametrize("seed", range(12))
def test_random_interleavings_lose_and_mix_nothing(tiny, tmp_path, seed):
    chance = random.Random(seed)
    save_to = f"actor_rollout.save={tmp_path / 'save'}"
    runs = [
        complete(look(load_config("tiny", [f"output_dir={tmp_path / name}", save_to])[0], 1))
        for name in chance.choice((("a",), ("a", "b")))
    ]
    running: list[Contender] = []
    everyone: list[Contender] = []
    for _ in range(30):
        if not running or (len(running) < 3 and chance.random() < 0.3):
            running.append(Contender(len(everyone), chance.choice(runs), tmp_path / "oracle"))
            everyone.append(running[-1])
        else:
            chosen = chance.choice(running)
            word = chance.choice(("step", "step", "step", "save", "stop", "kill"))
            if word in ("stop", "kill"):
                running.remove(chosen)
                chosen.end(killed=word == "kill")
            else:
                chosen.order(word)
        time.sleep(chance.choice((0, 0, 0.01, 0.05)))
    for contender in running:
        contender.end(killed=False)
    assert_nothing_is_lost_or_mixed(tmp_path, everyone)
    assert_the_refused_were_told(everyone)


def assert_nothing_is_lost_or_mixed(root: Path, everyone: list[Contender]) -> None:
    runs = [path.parent for path in root.glob("*/metrics.jsonl")]
    kept = {run: lines(run / "metrics.jsonl") for run in runs}
    for found in kept.values():
        steps = [step for step, _ in found]
        assert steps == sorted(set(steps)), "a step is recorded once, in order"
    anywhere = {entry for found in kept.values() for entry in found}
    anywhere |= {entry for run in runs for entry in lines(run / "logs" / "superseded.jsonl")}
    assert {tuple(step) for contender in everyone for step in contender.steps} <= anywhere
    for checkpoint in store.complete(root / "save"):
        manifest.check_sums(checkpoint, manifest.read(checkpoint))
        history = [tuple(entry) for entry in json.loads((checkpoint / "history").read_text())]
        assert [step for step, _ in history] == list(range(1, store.iteration_of(checkpoint) + 1))
        assert set(history) <= anywhere, "no step of one run stands for that of another"
    assert not list(root.glob("*/.earlier"))


def lines(path: Path) -> list[tuple[int, int]]:
    """(step, contender) of each line of metrics."""
    if not path.exists():
        return []
    entries = map(json.loads, path.read_text().splitlines())
    return [(entry["step"], entry["by"]) for entry in entries]


def assert_the_refused_were_told(everyone: list[Contender]) -> None:
    pids = {contender.process.pid for contender in everyone}
    for contender in everyone:
        for kind, value in contender.answers:
            if kind == "refused":
                assert "another run writes into" in value, value
                named = value.partition("process ")[2].split()[0]
                if named != "that":  # left no name: gone, and followed, before it could be read
                    assert int(named) in pids - {contender.process.pid}
