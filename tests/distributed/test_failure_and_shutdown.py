"""The life of a job: who is named when a rank dies, leaving early with everything saved, starting
again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.multiproc import run_ranks
from support.patience import LONG, wait_until

from r1zero import main
from r1zero.checkpoint import store as checkpoint_store
from r1zero.distributed import lookout, watchdog
from r1zero.distributed.launch import Launch
from r1zero.distributed.rendezvous import open_store, own_part
from r1zero.distributed.shutdown import BAD_INPUT, EXIT_REQUEUE, INTERRUPTED, PreemptionNotice
from r1zero.distributed.watchdog import FailureWatch
from r1zero.errors import BadInput
from r1zero.preflight import opening
from r1zero.run_folder.claim import Hold

ROOT = Path(__file__).resolve().parents[2]

# -- who is named ----------------------------------------------------------------------------------


def watched(rank: int, folder: Path) -> None:
    """A rank whose main thread never notices anything. Ranks 0 and 1 share a node."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w")
    for module in (watchdog, lookout):
        module.POLL_SECONDS, module.SILENT_POLLS = 0.1, 10
    watchdog.GRACE_SECONDS = 0.5
    wait_until(lambda: rank == 0 or (folder / "port").is_symlink())
    port = 0 if rank == 0 else int(os.readlink(folder / "port"))
    store = dist.TCPStore(
        "127.0.0.1", port, None, rank == 0, timedelta(seconds=LONG), wait_for_workers=False
    )
    if rank == 0:
        (folder / "port").symlink_to(str(store.port))  # a link is there whole or not at all
    watch = FailureWatch(store, rank, (0, 0, 1, 1), f"role {rank}")
    watch.before_exit = (folder / f"{rank}.last").touch
    (folder / f"{rank}.up").touch()
    time.sleep(60)


SILENT = "shows no sign of life for 1 s (killed, or its node is gone?)"
STORE_LOST = (
    "rank 0 or its node ended without a word (killed, or out of memory?): rank 2 (role 2) says "
)


@pytest.mark.parametrize(
    ("number", "victims", "sentence"),
    [
        (signal.SIGKILL, [3], "rank 3 (role 3) ended without a word (killed, or out of memory?)"),
        (signal.SIGKILL, [2], "rank 2 (role 2) ended without a word (killed, or out of memory?)"),
        (signal.SIGKILL, [2, 3], f"rank 2 (role 2) {SILENT}"),
        (signal.SIGSTOP, [3], f"rank 3 (role 3) {SILENT}"),
        (signal.SIGKILL, [0], STORE_LOST + "the job's store is gone"),
        (signal.SIGSTOP, [0], STORE_LOST + "the job's store has not answered for 1 s"),
    ],
    ids=[
        "a rank is killed",
        "the first rank of its node is killed",
        "a node is gone",
        "a rank is stopped",
        "rank 0, which holds the store, is killed",
        "the node of rank 0 answers no more",
    ],
)
def test_the_others_name_who_is_gone_and_end(tmp_path, number, victims, sentence):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=watched, args=(rank, tmp_path)) for rank in range(4)]
    for process in ranks:
        process.start()
    try:
        wait_until(lambda: all((tmp_path / f"{rank}.up").exists() for rank in range(4)))
        time.sleep(0.3)  # they have opened the tables of their nodes
        for victim in victims:
            os.kill(ranks[victim].pid, number)
        others = [process for rank, process in enumerate(ranks) if rank not in victims]
        wait_until(lambda: all(process.exitcode is not None for process in others))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert {process.exitcode for process in others} == {1}
    assert len(list(tmp_path.glob("*.last"))) == len(others), (
        "what a rank must do at any end is done"
    )
    said = "".join((tmp_path / f"{rank}.err").read_text() for rank in range(4))
    assert [line for line in said.splitlines() if line.startswith("r1zero: ")] == [
        f"r1zero: {sentence}"
    ]


# -- leaving early ---------------------------------------------------------------------------------


def as_program(
    rank: int,
    size: int,
    store: object,
    words: list[str],
    after: Path | None,
    signals: Sequence[int] = (signal.SIGTERM,),
) -> int:
    """The program in a world of one, with `signals` once `after` exists; returns its exit code."""
    for number in signals:  # a script's background jobs ignore some, and so would the program
        signal.signal(number, signal.SIG_DFL)
    if after is not None:

        def ask() -> None:
            wait_until(after.exists)
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.01)  # signals of one kind that wait together are one

        threading.Thread(target=ask, daemon=True).start()
    sys.argv = ["main.py", "--config", "tiny", *words]
    return main.main()


SMALL_STEPS = [
    "training.train_iters=5000",
    "training.eval_data_path=",
    "training.global_batch_size=4",
    "actor_rollout.micro_batch_size=2",
    "ref.micro_batch_size=1",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=8",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_signals_that_people_send_finish_the_step_save_and_leave(tiny, tmp_path, number):
    words = [f"output_dir={tmp_path}", *SMALL_STEPS]
    assert run_ranks(as_program, 1, words, tmp_path / "metrics.jsonl", [number]) == [EXIT_REQUEUE]
    said = (tmp_path / "logs" / "rank_0000.log").read_text()
    assert (
        f"left after step {steps(tmp_path)[-1]} of 5000: {signal.Signals(number).name} asks to "
        "leave"
    ) in said


@pytest.mark.parametrize(
    ("first", "second", "launcher"),
    [
        (signal.SIGINT, signal.SIGINT, {}),
        (signal.SIGTERM, signal.SIGINT, {}),
        (signal.SIGINT, signal.SIGTERM, {"TORCHELASTIC_RUN_ID": "what torchrun answers with"}),
    ],
)
def test_a_second_ctrl_c_ends_at_once_whatever_asked_first(
    tiny, tmp_path, monkeypatch, first, second, launcher
):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    words = [f"output_dir={tmp_path}", *SMALL_STEPS]
    with pytest.raises(AssertionError, match=f"died with exit code {INTERRUPTED}"):
        run_ranks(as_program, 1, words, tmp_path / "metrics.jsonl", [first, second])


def test_what_asked_first_is_told(tiny, tmp_path):
    """A terminal that is closed sends SIGHUP, and a scheduler may add SIGTERM while it saves."""
    words = [f"output_dir={tmp_path}", *SMALL_STEPS]
    signals = [signal.SIGHUP, signal.SIGTERM]
    assert run_ranks(as_program, 1, words, tmp_path / "metrics.jsonl", signals) == [EXIT_REQUEUE]
    assert ": SIGHUP asks to leave" in (tmp_path / "logs" / "rank_0000.log").read_text()


def waits_for_another(rank: int, size: int, store: dist.Store) -> None:
    """Rank 0 waits in a collective, where Python runs no handlers, and is told to leave twice."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if rank > 0:
        time.sleep(60)
    notice = PreemptionNotice()
    notice.listen()
    notice.begin()

    def ask() -> None:
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    dist.recv(torch.zeros(1), src=1)


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_others():
    with pytest.raises(AssertionError, match=f"rank 0 died with exit code {INTERRUPTED}"):
        run_ranks(waits_for_another, 2)


def test_a_forked_process_has_signals_of_its_own():
    """Such as one that a library starts, which Ctrl-C of a terminal reaches as well."""

    def parent(_rank: int, _size: int, _store: dist.Store) -> str | None:
        notice = PreemptionNotice()
        notice.listen()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.3)
        return notice.asked_by

    assert run_ranks(parent, 1) == [None]


def test_ctrl_c_before_there_is_anything_to_save_ends_at_once(tiny, tmp_path):
    words = [f"output_dir={tmp_path}", *SMALL_STEPS]
    with pytest.raises(AssertionError, match=f"died with exit code {INTERRUPTED}"):
        run_ranks(as_program, 1, words, tmp_path / "config.yaml", [signal.SIGINT])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ctrl_c_under_launch_sh_on_four_ranks(tiny, tmp_path):
    """As a terminal sends it: to the whole group in the foreground."""
    environment = os.environ | {"R1ZERO_SETUP": "0", "R1ZERO_PYTHON": sys.executable}
    command = [
        "bash",
        str(ROOT / "launch.sh"),
        "tiny",
        f"output_dir={tmp_path}",
        "training.eval_data_path=null",
        "training.train_iters=5000",
        "training.save_interval=1000",
    ]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=said
        )
        try:
            wait_until((tmp_path / "metrics.jsonl").exists)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=LONG) == EXIT_REQUEUE
        finally:
            process.kill()  # its ranks end with it
    lines = (tmp_path / "said").read_text().splitlines()
    last = steps(tmp_path)[-1]
    assert any(
        line.startswith(f"left after step {last} of 5000: SIGINT asks to leave") for line in lines
    )
    assert not [line for line in lines if "Traceback" in line or "Error" in line]


def test_sigterm_and_exit_before_finish_the_step_save_and_leave(tiny, tmp_path):
    words = [f"output_dir={tmp_path}", *SMALL_STEPS]
    assert run_ranks(as_program, 1, words, tmp_path / "metrics.jsonl") == [EXIT_REQUEUE]
    first = steps(tmp_path)
    assert run_ranks(as_program, 1, [*words, "training.exit_before=0.1"], None) == [EXIT_REQUEUE]
    assert len(steps(tmp_path)) > len(first) >= 1, "a step is always taken"
    assert (
        "s are left, and another step and save need"
        in (tmp_path / "logs" / "rank_0000.log").read_text()
    )


def steps(folder: Path) -> list[int]:
    """The recorded steps; the last one is the one that was saved."""
    found = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert found == list(range(1, len(found) + 1))
    assert checkpoint_store.iteration_of(checkpoint_store.find(folder / "checkpoints")) == found[-1]
    return found


# -- a second start -------------------------------------------------------------------------------


def begin(words: list[str]) -> multiprocessing.Process:
    """The program in a world of one, beside this process."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(as_program(0, 1, None, words, None))
    )
    process.start()
    return process


SHORT = [*SMALL_STEPS, "training.train_iters=40"]


def test_a_second_start_is_refused_and_a_killed_run_is_followed(tiny, tmp_path, capfd):
    folder = tmp_path / "run"
    words = [f"output_dir={folder}", *SHORT]
    recorded = folder / "metrics.jsonl"
    first = begin(words)
    wait_until(recorded.exists)
    elsewhere = [f"output_dir={tmp_path / 'b'}", f"actor_rollout.save={folder / 'checkpoints'}"]
    for second in (words, elsewhere + words[1:]):
        assert run_ranks(as_program, 1, second, None) == [BAD_INPUT]
        [sentence] = capfd.readouterr().err.splitlines()
        assert "another run writes into" in sentence and f"process {first.pid} on " in sentence
    first.join(LONG)
    assert first.exitcode == 0 and not (tmp_path / "run.1").exists()
    found = [json.loads(line)["step"] for line in recorded.read_text().splitlines()]
    assert found == list(range(1, 41))
    killed = begin(words)
    wait_until(lambda: (tmp_path / "run.1").exists() and recorded.exists())
    killed.kill()
    killed.join()
    assert run_ranks(as_program, 1, [*words, "training.train_iters=1"], None) == [0]
    said = (folder / "logs" / "rank_0000.log").read_text()
    assert f"is taken over from process {killed.pid} on " in said
    assert f"is now in {folder}.2" in said


def test_a_run_whose_folder_was_moved_ends_and_leaves_what_is_there_now_alone(
    tiny, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    folder, recorded = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    first = begin([f"output_dir={folder}", *SHORT, "training.train_iters=4000"])
    wait_until(recorded.exists)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    recorded.write_text("of somebody else\n")
    first.join(LONG)
    assert first.exitcode == BAD_INPUT
    [sentence] = [line for line in capfd.readouterr().err.splitlines() if "r1zero: " in line]
    assert sentence.startswith(
        f"r1zero: {folder} was moved or removed while this run wrote into it"
    )
    assert os.listdir(folder) == ["metrics.jsonl"] and recorded.read_text() == "of somebody else\n"
    assert os.listdir(tmp_path / "moved" / ".owner") == ["0000001.ended"]


def put_another_in_its_place(folder: Path) -> None:
    """Move a run's folders away, and put one there that has all that a run makes, of somebody
    else."""
    for taken in (folder, folder.with_name("save")):
        taken.rename(taken.with_name(f"moved {taken.name}"))
    for name in (
        "logs",
        "samples",
        "evaluation",
        "tensorboard",
        "checkpoints",
        "profile",
        "../save",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("of somebody else\n")


def tree(folder: Path) -> dict[str, str | None]:
    """All that is in a folder: the text of files by their paths, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "writer", ["_open", "_evaluate", "after_step", "_make_room", "_seal", "_obstacle"]
)
def test_a_folder_that_takes_the_place_between_the_look_and_the_write_is_left_alone(
    tiny, tmp_path, monkeypatch, capfd, writer
):
    """The others look before they write; the opening is followed by the logs, which do not."""
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    folder, moved = tmp_path / "run", threading.Event()

    def then_move(function: Callable) -> Callable:
        def wrapped(*args: object) -> object:
            result = function(*args)
            callers = (function.__name__, sys._getframe(1).f_code.co_name)
            if writer in callers and not moved.is_set():
                moved.set()
                put_another_in_its_place(folder)
            return result

        return wrapped

    monkeypatch.setattr(Hold, "check", then_move(Hold.check))
    monkeypatch.setattr(opening, "_open", then_move(opening._open))
    words = [
        f"output_dir={folder}",
        f"actor_rollout.save={tmp_path / 'save'}",
        *SHORT,
        "training.train_iters=2",
        "training.save_interval=1",
        "training.logger=[tensorboard]",
        "training.report_interval=1",
        "training.profile_steps=[2]",
        "training.on_save_failure=stop",
    ]
    words.remove("training.eval_data_path=")
    run = begin(words)
    run.join(LONG)
    said = capfd.readouterr().err
    assert run.exitcode == BAD_INPUT, said
    [sentence] = [line for line in said.splitlines() if "r1zero: " in line]
    assert "was moved or removed while this run wrote into it" in sentence
    assert "Traceback" not in said
    there = dict.fromkeys(
        ("logs", "samples", "evaluation", "tensorboard", "checkpoints", "profile")
    )
    assert tree(folder) == there | {"metrics.jsonl": "of somebody else\n"}
    assert tree(tmp_path / "save") == {}
    assert os.listdir(tmp_path / "moved run" / ".owner") == ["0000001.ended"]


# -- starting again --------------------------------------------------------------------------------


def start(port: int, size: int) -> list[dist.Store]:
    """What each of so many ranks gets, all started at once as torchrun does."""
    parts: dict[int, dist.Store] = {}

    def join(rank: int) -> None:
        launch = Launch("torchrun", rank, size, rank, (0,) * size, "127.0.0.1", port)
        parts[rank] = own_part(open_store(launch, 10), launch, 10)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [parts[rank] for rank in range(size)]


def test_a_restart_does_not_see_what_the_ranks_before_wrote(monkeypatch):
    """In the store of torchrun's agent, which outlives them; one rank had died while it joined."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = dist.TCPStore("127.0.0.1", 0, None, True)
    for attempt in range(3):
        first, *others = start(agent.port, 3)
        assert not any(part.check(["cause"]) for part in (first, *others))
        first.set("cause", f"of attempt {attempt}")
        assert [part.get("cause").decode() for part in others] == [f"of attempt {attempt}"] * 2
        agent.set("r1zero/start/asks/2", "one who died")


def test_a_rank_that_never_comes_is_named():
    launch = Launch("slurm", 0, 3, 0, (0, 0, 1), "127.0.0.1", 0)
    with pytest.raises(BadInput, match="rank 1, 2 did not come within 0.2 s"):
        own_part(open_store(launch, 5), launch, 0.2)
