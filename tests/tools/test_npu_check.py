"""tools/npu_check.py on the stand-in for torch_npu: every item passes, and fails when the thing that
it looks at is broken."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
from support.npu_process import on_npu
from support.npu_worlds import environment
from support.patience import LONG
from support.tool import functions, run_here

from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config

ROOT = Path(__file__).resolve().parents[2]
# Items that are run by the tool itself, in processes of their own.
IN_PROCESSES = ("float64", "tiny_job")
# The others, which start one job at most, and ranks.
PASSING = [
    ("versions", 1),
    ("environment", 1),
    ("groups", 2),
    ("operators", 1),
    ("draws", 2),
    ("graphs", 2),
    ("mismatch", 1),
    ("publish", 2),
    ("model_step", 1),
    ("long_wait", 2),
]
# Item, ranks, a fault of npu_items.FAULTS, and a part of the sentence of FAIL.
BROKEN = [
    ("versions", 1, "versions are judged", "mindspeed is not installed; clone MindSpeed's branch"),
    ("versions", 1, "MindSpeed cannot be imported", "ImportError: No module named 'einops'"),
    ("float64", 2, "MindSpeed's sum", "the sum of float64 over gloo is"),
    ("environment", 1, "a queue without graphs", "TASK_QUEUE_ENABLE=2 makes torch_npu refuse"),
    ("operators", 1, "no mask", "training attention, head size 64 is off by"),
    ("operators", 1, "half a gradient", "training attention, head size 64 is off by"),
    ("operators", 1, "lengths one short", "decode attention, head size 64 is off by"),
    ("operators", 1, "lengths of latents one short", "attention to latents, 2 heads is off by"),
    ("operators", 1, "latents without the rotary part", "attention to latents, 3 heads is off by"),
    ("operators", 1, "copies in another order", "experts 0 to 7 of 8, 16 tokens is off by"),
    ("operators", 1, "the sign of the sine", "rotary, head size 64 is off by"),
    ("groups", 2, "a sum in bf16", "the sum in bf16 over the world [0, 1]: 1 of 1000 elements"),
    ("groups", 2, "nothing sent", "send and receive over the world [0, 1]: "),
    ("graphs", 1, "graphs with stale lengths", "TP 1: with and without graphs 4 of 4 samples part"),
    ("graphs", 1, "graphs that are not captured", "TP 1: no decoding step was captured"),
    (
        "publish",
        2,
        "weights changed on the way",
        "embedding.word_embeddings.weight on rollout rank",
    ),
    ("long_wait", 2, "a barrier that nobody waits at", "rank 0 of 2 waited 0.0 s instead of 2 s"),
    ("mismatch", 1, "sharper logits in rollout", "rollout and trainer differ by 0.0"),
    ("model_step", 1, "a program that dies", "exit code 1: rank 0 (train) is out of memory"),
    ("draws", 2, "parts of an all_gather swapped", "TP 2, whole distribution: "),
]


def npu_check(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run the tool; exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "npu_check.py"), *arguments],
        text=True,
        capture_output=True,
        timeout=4 * LONG,  # one item after the other
        env={**os.environ, **variables},
    )
    return done.returncode, done.stdout, done.stderr


def npu_check_here(arguments: list[str]) -> tuple[int, str, str]:
    """The same in this process."""
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_here("npu_check.py", *arguments)
    return code, out.getvalue(), err.getvalue()


def test_without_an_npu_it_says_so_in_one_sentence() -> None:
    code, out, err = npu_check()
    assert code == 2
    assert out == ""
    [sentence] = err.splitlines()
    assert "no NPU that torch_npu sees" in sentence and "set_env.sh" in sentence


def test_every_item_is_seen_to_pass_here() -> None:
    names = {item.name for item in functions("npu_check.py")["ITEMS"]}
    assert names == {item for item, _ in PASSING} | set(IN_PROCESSES)


def test_it_runs_items_in_processes_of_their_own_and_reports_them(npu, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, err = npu_check(
        *(
            "--devices",
            "2",
            "--size",
            "small",
            "--only",
            ",".join(IN_PROCESSES),
            "--out",
            str(report),
        ),
        **environment(),
    )
    assert code == 0, out + err
    found = json.loads(report.read_text())
    verdicts = {name: outcome["verdict"] for name, outcome in found["items"].items()}
    assert verdicts == dict.fromkeys(IN_PROCESSES, "PASS")
    for name, outcome in found["items"].items():
        assert f"{name:12} PASS" in out and outcome["line"] in out
        assert outcome["values"], f"{name} has no figures"
    assert "and so are all metrics, bit for bit" in out
    assert "2 PASS, 0 FAIL, 0 SKIP" in out


@pytest.mark.parametrize(("item", "ranks"), PASSING)
def test_an_item_passes_on_the_stand_in(npu, item: str, ranks: int) -> None:
    lines = npu.run("npu_check_item", ranks, item, "")
    assert lines[0]


KILLS_THE_LAST_RANK = """
import os, signal, sys, threading, time

def strike():
    while not hasattr(sys.modules.get("npu_checks.long_wait"), "run"):
        time.sleep(0.01)
    sys.modules["npu_checks.long_wait"].keep_busy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1":
    threading.Thread(target=strike, daemon=True).start()
"""


def test_a_rank_that_is_killed_is_named(npu, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLS_THE_LAST_RANK)
    variables = environment()
    variables["PYTHONPATH"] += os.pathsep + str(tmp_path)
    report = tmp_path / "report.json"
    code, out, _ = npu_check(
        *("--devices", "2", "--size", "small", "--only", "long_wait", "--out", str(report)),
        **variables,
    )
    assert code == 1
    assert "long_wait    FAIL" in out
    assert "rank 1 (all) ended without a word (killed, or out of memory?)" in out
    assert "next: HCCL ended a rank that did nothing wrong" in out
    assert json.loads(report.read_text())["items"]["long_wait"]["output"]


def test_what_takes_too_long_is_ended_and_what_needs_it_is_left_out(npu, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, _ = npu_check(
        *("--devices", "2", "--only", "float64,groups,draws", "--limit-factor", "0.001"),
        *("--out", str(report)),
        **environment(),
    )
    assert code == 1
    assert "did not end within its time; --limit-factor 2" in out
    assert out.count("needs float64, which failed") == 2
    assert "next: mend float64 first" in out
    assert "0 PASS, 1 FAIL, 2 SKIP" in out


def test_one_device_leaves_out_what_needs_two(npu, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, out, _ = npu_check(
        *("--devices", "1", "--only", "groups,publish,long_wait", "--out", str(report)),
        **environment(),
    )
    assert code == 0
    assert out.count("needs 2 devices, and has 1") == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "99"], "--devices 99 must be from 1 to 16, which are visible here"),
        (["--only", "float46"], "float46 is no item; did you mean float64?"),
        (["--model", "/nowhere"], "--model /nowhere has no config.json"),
        (["--out", "/nowhere/report.json"], "cannot be written"),
        (["--limit-factor", "0"], "--limit-factor 0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments: list[str], sentence: str) -> None:
    code, out, err = on_npu(npu_check_here, arguments)
    assert code == 2
    assert out == ""
    assert sentence in err and len(err.splitlines()) == 1


@pytest.fixture
def model_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The item's module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("npu_checks.model_step")


def test_samples_of_the_second_run_that_are_others_are_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    item = importlib.import_module("npu_checks.tiny_job")
    sample = {"prompt": "1+1", "response": "2", "reward": 1.0, "truncated": False}
    runs = {
        "one": [sample, sample],
        "same": [sample, sample],
        "other": [sample, {**sample, "response": "3"}],
    }
    monkeypatch.setattr(item.jobs, "samples", lambda folder, step: runs[folder.name])
    item.compare_samples(Path("one"), Path("same"), range(1, 3), "a second run")
    with pytest.raises(Exception) as failed:
        item.compare_samples(Path("one"), Path("other"), range(3, 4), "the run that was resumed")
    assert str(failed.value) == "step 3: 1 of 2 samples of the run that was resumed are others"


def test_memory_that_is_far_from_the_estimate_is_a_failure(model_step: ModuleType) -> None:
    model_step.compare_memory({"train": 12.4, "ref": 0.76}, {"train": 10.0, "ref": 1.0})
    with pytest.raises(Exception) as failed:
        model_step.compare_memory({"train": 12.6, "ref": 0.76}, {"train": 10.0, "ref": 1.0})
    assert str(failed.value) == "train took 12.60 GB, the dry run says 10.00"


@pytest.mark.parametrize("devices", range(1, 17))
def test_all_devices_have_a_role_in_the_model_step(model_step: ModuleType, devices: int) -> None:
    ranks, layout = model_step.layout_of(devices)
    cfg, _ = load_config("tiny", [*model_step.jobs.LARGE, *layout])
    placement = look(cfg, ranks).placement
    assert placement is not None and placement.world_size == ranks
    assert ranks == (devices if devices >= 4 else 1)
    assert cfg.actor_rollout.ppo_mini_batch_size % placement.train.dp == 0


@pytest.mark.parametrize(("item", "ranks", "fault", "sentence"), BROKEN)
def test_an_item_fails_when_its_thing_is_broken(
    npu, item: str, ranks: int, fault: str, sentence: str
) -> None:
    with pytest.raises(AssertionError) as failed:
        npu.run("npu_check_item", ranks, item, fault)
    assert "CheckFailed: " in str(failed.value)
    assert sentence in str(failed.value)
