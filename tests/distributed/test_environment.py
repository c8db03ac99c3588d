"""What stands around a start and is none of the run's business: rank variables, paths and words as
people write them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from support.launch_sh import launch
from support.patience import LONG
from support.program import run_program
from support.small_config import load, write
from support.tool import functions

from r1zero.config.paths import expand
from r1zero.distributed.launch import Launch, check_interfaces, read_launch
from r1zero.distributed.rendezvous import open_store
from r1zero.distributed.shutdown import SIGNALS, PreemptionNotice
from r1zero.distributed.spawn import is_free, parse, rank_environments
from r1zero.distributed.spawn import main as spawn
from r1zero.distributed.watchdog import is_lost_connection
from r1zero.errors import BadInput
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
TP2 = [
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.num_gpus_for_train=2",
    "actor_rollout.num_gpus_for_infer=2",
    "resource_pool.actor_rollout=[4]",
    "resource_pool.ref=[1]",
]
PTY = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "n1",
}
POD = {"RANK": "0", "MASTER_ADDR": "m", "MASTER_PORT": "23456"}


def program(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_program(ROOT / "r1zero" / "main.py", *arguments, environment=os.environ | variables)


# -- rank variables --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        PTY,
        PTY | {"MASTER_ADDR": "127.0.0.1"},
        POD | {"WORLD_SIZE": "1"},
        POD | {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "WORLD_SIZE": "8"},
        {"WORLD_SIZE": "many", "RANK": "x"},
    ],
    ids=[
        "srun --pty",
        "with an address",
        "one pod",
        "two pods",
        "left over",
        "of eight",
        "nonsense",
    ],
)
def test_what_only_looks_ignores_them(tiny: Path, variables: dict[str, str]) -> None:
    done = program("--config", "tiny", "--check", *TP2, **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert program("--config", "tiny", "--print-world-size", *TP2, **variables).stdout == "5\n"


@pytest.mark.parametrize(
    "variables", [PTY, POD | {"WORLD_SIZE": "2"}], ids=["srun --pty", "two pods"]
)
def test_launch_sh_ignores_them_and_says_so(tiny: Path, variables: dict[str, str]) -> None:
    code, said, errors = launch("tiny", "--check", *TP2, **variables)
    assert code == 0 and errors == ""
    assert ("are not mine and are ignored" in said) == ("RANK" in variables)


def test_ranks_get_variables_of_their_own() -> None:
    args = parse(
        [
            "--nnodes",
            "2",
            "--node-rank",
            "1",
            "--nproc-per-node",
            "4",
            "--master-port",
            "5",
            "main.py",
        ]
    )
    found = rank_environments(args)
    assert [entry["RANK"] for entry in found] == ["4", "5", "6", "7"]
    assert {entry["WORLD_SIZE"] for entry in found} == {"8"} and found[2]["LOCAL_RANK"] == "2"


# -- the meeting of the ranks ----------------------------------------------------------------------


def test_interfaces_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert check_interfaces() == []
    for wrong in ("^lo,docker", "eth77", "lo,eth77"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", wrong)
        assert (
            f"GLOO_SOCKET_IFNAME={wrong}" in check_interfaces()[0]
            and "such" not in check_interfaces()[0]
        )
    done = program("--config", "tiny", "--check")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert not is_free(port)
        assert spawn(["--nproc-per-node", "1", "--master-port", str(port), "main.py"]) == 2
    assert f"MASTER_PORT={port} is in use on this node" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_ranks(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    cases = {"0": 0, "75": 75, "2 if rank else 1": 2, "0 if rank else 3": 3}
    for expression, expected in cases.items():
        script.write_text(f"import os, sys; rank = int(os.environ['RANK']); sys.exit({expression})")
        command = [
            sys.executable,
            str(ROOT / "r1zero" / "distributed" / "spawn.py"),
            "--nproc-per-node",
            "2",
            str(script),
        ]
        assert subprocess.run(command, timeout=LONG).returncode == expected


# -- paths -----------------------------------------------------------------------------------------


def test_paths_are_expanded_in_every_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RUNS", str(home / "runs"))
    assert load(home, "output_dir=~/x").output_dir == f"{home}/x"
    assert load(home, "output_dir=$RUNS/x").output_dir == f"{home}/runs/x"
    assert load(home, "output_dir=${RUNS}/x").output_dir == f"{home}/runs/x"
    assert load(home, "actor_rollout.save=~/c").actor_rollout.save == f"{home}/c"
    assert (
        load(home, "training.eval_data_path=~/train.parquet").training.eval_data_path
        == f"{home}/train.parquet"
    )
    blend = load(
        home, "actor_rollout.data_path='0.7,~/train.parquet,0.3,$RUNS/b'"
    ).actor_rollout.data_path
    assert blend == f"0.7,{home}/train.parquet,0.3,{home}/runs/b"
    scorers = ["algorithm.verifier_function=[acc, '~/mine.py:score']"]
    assert load(home, *scorers).algorithm.verifier_function == ["acc", f"{home}/mine.py:score"]
    text = yaml.safe_load((home / "base.yaml").read_text()) | {"output_dir": "~/from_yaml"}
    assert (
        load_config(write(home, "tilde", yaml.safe_dump(text)))[0].output_dir == f"{home}/from_yaml"
    )


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("${oc.env:HOME}/x", "${oc.env:HOME}, which is not expanded here; write $NAME"),
        ("${hydra:runtime.cwd}/x", "not expanded here"),
        ("${HOME", "not expanded here"),
        ("$NOT_SET_ANYWHERE/x", "the environment variable NOT_SET_ANYWHERE, which is not set"),
        ("~nobody_of_that_name/x", "home of a user who is not known"),
    ],
)
def test_what_cannot_be_expanded_is_refused(home: Path, text: str, piece: str) -> None:
    for key in ("output_dir", "actor_rollout.load", "actor_rollout.data_path"):
        with pytest.raises(BadInput) as refused:
            load(home, f"{key}={text}")
        assert str(refused.value).startswith(f"{key}: ") and piece in str(refused.value)


def test_a_path_that_exists_as_written_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~odd$name").mkdir()
    assert expand("~odd$name") == "~odd$name"


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "tiny", "training.seed=3", "--check", "output_dir=o/x"],
        ["training.seed=3", "--config", "tiny", "output_dir=o/x", "--check"],
        ["--check", "training.seed=3", "--local-rank=1", "--config=tiny"],
    ],
)
def test_flags_and_overrides_in_any_order(tiny: Path, tmp_path: Path, words: list[str]) -> None:
    done = program(*words)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        (["--chek"], "--chek is no flag; did you mean --check?"),
        (
            ["--training.seed=3"],
            "--training.seed is no flag; an override has no dashes in front: training.seed=3",
        ),
        (["--config", "tiny", "--config", "tiny"], "--config is given 2 times"),
    ],
)
def test_wrong_words_are_told_in_ours(words: list[str], piece: str) -> None:
    done = program(*words)
    assert done.returncode == 2 and piece in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )


@pytest.mark.parametrize(
    "words",
    [
        ["training.seed=5", "--config", "tiny"],
        ["--config=tiny", "training.seed=5"],
        ["training.seed=5", "--dry-run", "output_dir=o/y", "--config", "tiny"],
    ],
)
def test_launch_sh_takes_the_config_anywhere(tiny: Path, words: list[str]) -> None:
    code, said, _ = launch(*words, "--print-world-size")
    assert code == 0 and said.endswith("\n4\n")


def test_launch_sh_refuses_two_configs(tiny: Path) -> None:
    code, _, errors = launch("tiny", "--config", "qwen25_7b", "--check")
    assert code == 2 and "is named 2 times" in errors


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("reward:\n  workers\uff1a 3\n", ["line 1", "U+FF1A", "type a colon instead"]),
        ("reward:\n  workers\uff1a3\n", ["U+FF1A"]),
        ("reward:\n\u00a0 workers: 3\n", ["U+00A0", "type a blank instead"]),
        ("reward:\n  workers:\u30003\n", ["U+3000", "type a blank instead"]),
    ],
)
def test_characters_that_look_like_yaml_are_named(home: Path, text: str, pieces: list[str]) -> None:
    path = write(home, "wide", (home / "base.yaml").read_text() + text)
    with pytest.raises(BadInput) as refused:
        load_config(path)
    line = (home / "base.yaml").read_text().count("\n") + 2
    assert f"wide.yaml, line {line}:" in str(refused.value)
    assert all(piece in str(refused.value) for piece in pieces[-1:])


def test_such_characters_inside_texts_are_nobodys_business(home: Path) -> None:
    text = (home / "base.yaml").read_text() + 'name: "\u7ec3\uff1a\u00a0x"  # \u6ce8\uff1a\n'
    assert load_config(write(home, "chinese", text))[0].name == "\u7ec3\uff1a\u00a0x"


@pytest.mark.parametrize(
    "key", ["training.save_interval", "training.eval_data_path", "actor_rollout.save"]
)
def test_none_is_null(home: Path, key: str) -> None:
    with pytest.raises(BadInput, match=f"{key}: None is a word to YAML; write null"):
        load(home, f"{key}=None")


def test_a_list_in_quotes_is_a_list(home: Path) -> None:
    cfg = load(
        home, "algorithm.verifier_function='[acc, format]'", "algorithm.verifier_weight='[1, 0.5]'"
    )
    assert cfg.algorithm.verifier_function == [
        "acc",
        "format",
    ] and cfg.algorithm.verifier_weight == [1.0, 0.5]
    with pytest.raises(BadInput, match=r"'acc, format' must be a list"):
        load(home, "algorithm.verifier_function='acc, format'")


PROGRAM = [sys.executable, str(ROOT / "r1zero" / "main.py"), "--config", "tiny"]


def shell(words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """The program on `tiny` with such words, written as for a shell."""
    command = shlex.join(PROGRAM)
    return subprocess.run(
        ["bash", "-c", f"{command} {words}"],
        env=os.environ | variables,
        capture_output=True,
        timeout=LONG,
    )


def test_a_full_disk_behind_standard_output_is_one_sentence(tiny: Path) -> None:
    for flag in ("--dry-run", "--print-world-size"):
        done = shell(f"{flag} > /dev/full")
        said = done.stderr.decode()
        assert done.returncode == 1
        assert said == "r1zero: standard output cannot be written: No space left on device\n"


def test_streams_that_were_closed_are_no_fault(tiny: Path, tmp_path: Path) -> None:
    """What a library prints must not land in the file that took the stream's number."""
    small = [
        "training.train_iters=1",
        "training.eval_data_path=null",
        "training.global_batch_size=4",
        "actor_rollout.ppo_mini_batch_size=16",
        "actor_rollout.n_samples_per_prompt=4",
        "actor_rollout.micro_batch_size=4",
        "ref.micro_batch_size=4",
    ]
    words = shlex.join([f"output_dir={tmp_path / 'run'}", *small])
    done = shell(f"{words} <&- >&- 2>&-")
    assert done.returncode == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_locale_of_another_encoding_does_not_change_what_is_read(
    tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "l\u00e4ufe \u6d4b\u8bd5"
    other = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell(shlex.join(["--dry-run", f"output_dir={run}"]), **other)
    assert done.returncode == 0, done.stderr
    # as YAML writes them; a long path is folded at its space
    assert r"l\xE4ufe" in done.stdout.decode()
    assert r"\u6D4B\u8BD5" in done.stdout.decode()


def test_a_current_directory_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    cfg = load(home)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(BadInput, match="the current directory is not there any more"):
        check(cfg)


def test_a_closed_standard_output_is_no_traceback_a_line(tiny: Path, tmp_path: Path) -> None:
    """As behind `| head`."""
    read, write_end = os.pipe()
    os.close(read)
    words = [
        "--config",
        "tiny",
        f"output_dir={tmp_path}",
        "training.train_iters=1",
        "training.eval_data_path=null",
        "training.global_batch_size=4",
        "actor_rollout.ppo_mini_batch_size=16",
        "actor_rollout.n_samples_per_prompt=4",
        "actor_rollout.micro_batch_size=4",
        "ref.micro_batch_size=4",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "r1zero" / "main.py"), *words],
        stdout=write_end,
        text=True,
        stderr=subprocess.PIPE,
        timeout=LONG,
    )
    os.close(write_end)
    assert (
        done.returncode == 0
        and "Traceback" not in done.stderr
        and "Logging error" not in done.stderr
    )
    assert (tmp_path / "model" / "config.json").exists()


# -- faults of ours and mistakes of users ----------------------------------------------------------

PLANTED = """
import sys
sys.path.insert(0, {root!r})
from r1zero import main
import r1zero.{module} as module
def broken(*_, **__):
    raise {error}
module.{name} = broken
sys.argv = ["main.py", "--config", "tiny", "training.eval_data_path=null", "output_dir={out}"]
sys.exit(main.main())
"""


@pytest.mark.parametrize(
    ("module", "name", "error", "code", "said"),
    [
        (
            "trainer",
            "build_runtime",
            "ValueError('shapes (3,) (4,)')",
            1,
            "rank 0 (train+rollout+ref) failed: ValueError: shapes",
        ),
        (
            "distributed.groups",
            "_join_everyone",
            "OSError('no such device')",
            1,
            "failed: OSError: no such device",
        ),
        ("distributed.groups", "_join_everyone", "main.BadInput('no way')", 2, "r1zero: no way"),
        ("trainer", "build_runtime", "main.BadInput('no data')", 2, "r1zero: no data"),
    ],
    ids=["a ValueError", "a fault while joining", "bad input while joining", "bad input"],
)
def test_only_bad_input_is_told_as_the_users_mistake(
    tiny: Path, tmp_path: Path, module: str, name: str, error: str, code: int, said: str
) -> None:
    run = tmp_path / "run"
    script = tmp_path / "planted.py"
    script.write_text(
        PLANTED.format(root=str(ROOT), module=module, name=name, error=error, out=run)
    )
    done = run_program(script)
    log = run / "logs" / "rank_0000.log"
    logged = log.read_text() if log.exists() else ""
    assert done.returncode == code and said in done.stderr, done.stderr
    assert ("Traceback" in done.stderr + logged) == (code == 1)
    assert len([line for line in done.stderr.splitlines() if line.startswith("r1zero: ")]) == 1


# -- what a hostile reader tried -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"RANK": "5", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "29500"},
            "RANK=5 must be from 0 to 3",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "0", "MASTER_PORT": "29500"},
            "LOCAL_WORLD_SIZE=0",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999 must be from 1",
        ),
    ],
)
def test_numbers_of_a_launcher_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=sentence):
        read_launch()


def test_a_port_that_is_none_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for port in ("99999", "0", "-1", "abc", ""):
        assert spawn(["--nproc-per-node", "1", f"--master-port={port}", "main.py"]) == 2
        said = capsys.readouterr().err
        assert said == f"r1zero: MASTER_PORT={port} must be from 1 to 65535\n"


def test_signals_that_are_ignored_stay_so() -> None:
    """As under nohup, and for the background jobs of a script."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        PreemptionNotice().listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError(
                "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
                "[127.0.0.1]:1"
            ),
            True,
        ),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (
            dist.DistBackendError("NCCL error: remote process exited, connection reset by peer"),
            True,
        ),
        (dist.DistBackendError("Duplicate GPU detected"), False),
        (RuntimeError("the peer of this socket has no connection in the plan"), False),
        (
            RuntimeError(
                "[enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:84] no such "
                "socket"
            ),
            False,
        ),
        (ValueError("connection"), False),
    ],
)
def test_a_lost_connection_is_told_by_what_was_raised(error: Exception, lost: bool) -> None:
    assert is_lost_connection(error) == lost


def test_a_name_without_an_address_is_one_sentence() -> None:
    launch = Launch("slurm", 1, 2, 0, (0, 1), "no-such-host.invalid", 29500)
    with pytest.raises(
        BadInput, match="MASTER_ADDR=no-such-host.invalid has no address that rank 1 can find"
    ):
        open_store(launch, 0.2)


@pytest.mark.parametrize(
    ("key", "inside"), [("actor_rollout.load", "model"), ("training.resume", "checkpoints")]
)
def test_a_run_folder_names_what_is_meant_in_it(home: Path, key: str, inside: str) -> None:
    run = home / "run"
    (run / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (run / "checkpoints" / "iter_0000003" / "complete.json").write_text('{"files": {}}')
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
    shutil.copytree(home / "net", run / "model")
    (run / "metrics.jsonl").write_text("")
    assert any(f"{run}/{inside}" in problem for problem in check(load(home, f"{key}={run}")))


def test_tools_expand_what_a_shell_leaves_alone(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("HOME", str(home))
    parse_words = functions("convert_ckpt.py")["parse"]
    assert parse_words(["--from=~/net", "--to=$HOME/out"]).load_dir == home / "net"
