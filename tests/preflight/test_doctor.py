"""The doctor: fine here, eight mistakes named with their way out, and ranks that do not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.multiproc import run_ranks
from support.patience import LONG
from support.program import run_program
from support.small_config import load

from r1zero.distributed.launch import Launch
from r1zero.distributed.rendezvous import RollCall
from r1zero.preflight import machine
from r1zero.preflight.found import look
from r1zero.preflight.machine import NodeReport

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = str(ROOT / "tools" / "doctor.py")


def doctor(*arguments: str) -> tuple[int, list[str], str]:
    """Run it; exit code, lines of standard output, standard error."""
    done = run_program(DOCTOR, *arguments, folder=ROOT)
    return done.returncode, done.stdout.splitlines(), done.stderr


def doctor_alone(*words: str, **variables: str) -> tuple[int, list[str], str]:
    """The same in an interpreter of its own: `words` come behind its name."""
    done = subprocess.run(
        [sys.executable, *words],
        text=True,
        capture_output=True,
        timeout=LONG,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_this_machine_is_fine_and_nothing_is_left_behind(tiny, tmp_path):
    code, lines, errors = doctor(f"output_dir={tmp_path}/run")
    assert code == 0 and not errors, (lines, errors)
    assert [line.split()[1] for line in lines] == [
        "config",
        "versions",
        "devices",
        "kernels",
        "memory",
        "groups",
    ]
    assert not any(line.startswith("PROBLEM") for line in lines) and not list(tmp_path.iterdir())


def test_under_torchrun_every_planned_group_adds_up(tiny, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    code, lines, errors = doctor_alone(*torchrun, DOCTOR, f"output_dir={tmp_path}/run")
    assert code == 0, (lines, errors)
    assert lines[-1].startswith("ok       groups       4 ranks:"), lines


def test_a_config_wrong_in_eight_ways_gets_eight_ways_out(tiny):
    wrong = {
        "algorithm.verifier_weight=[1]": (
            "algorithm.verifier_weight: [1.0] has 1 weights",
            "give as many, such as [0.5, 0.5]",
        ),
        "actor_rollout.ppo_mini_batch_size=60": (
            "ppo_mini_batch_size: 60",
            "32 and 64 are the nearest that would work",
        ),
        "ref.load=models/nowhere": (
            "models/nowhere does not exist",
            "must be a Hugging Face model folder",
        ),
        "actor_rollout.data_path=nowhere.parquet": (
            "nowhere.parquet does not exist",
            "must be a file of prompts",
        ),
        "training.prompt_type=qwen_r2": ("'qwen_r2' is not in", "the nearest are qwen_r1"),
        "training.logger=[tensorbord]": ("tensorbord is not one of", "did you mean tensorboard?"),
        "output_dir=/proc/nowhere": (
            "output_dir: /proc/nowhere cannot be written",
            "name another folder",
        ),
        "training.distributed_backend=hccl": (
            "hccl needs NPUs",
            "training.distributed_backend=gloo runs on CPUs",
        ),
    }
    code, lines, errors = doctor(*wrong)
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert code == 2 and not errors, errors
    for what, way_out in wrong.values():
        assert any(what in line and way_out in line for line in problems), (what, problems)
    assert len({line.split(maxsplit=2)[2].split(";")[0] for line in problems}) >= 8
    assert lines[-1] == f"{len(problems)} problems"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["actor_rollout.tensor_model_parallel_size=0", "resource_pool.ranks_per_node=0"],
            "size: 0 must be at least 1",
        ),
        ([f"output_dir={'x' * 300}"], "File name too long"),
    ],
)
def test_impossible_values_do_not_end_the_doctor(tiny, wrong, said):
    code, lines, errors = doctor(*wrong)
    assert code == 2 and not errors and "PROBLEM  config" in lines[0] and said in lines[0], (
        lines,
        errors,
    )
    assert any(line.startswith("ok       versions") for line in lines)


def test_an_unreadable_config_still_gets_the_machine_looked_at(tiny):
    code, lines, _ = doctor("training.train_itrs=6")
    assert code == 2 and "did you mean train_iters?" in lines[0]
    assert any(line.startswith("ok       versions") for line in lines)


def test_wrong_keys_and_missing_files_are_told_in_one_pass(tiny):
    code, lines, errors = doctor(
        "training.train_itrs=6",
        "actor_rollout.lr=high",
        "ref.load=models/nowhere",
        "actor_rollout.data_path=nowhere.parquet",
        "training.eval_data_path=$R1ZERO_UNSET/test.parquet",
    )
    assert code == 2 and not errors, errors
    problems = [line for line in lines if line.startswith("PROBLEM  config")]
    said = (
        "did you mean train_iters?",
        "actor_rollout.lr: 'high'",
        "ref.load: models/nowhere does not exist",
        "actor_rollout.data_path: nowhere.parquet does not exist",
        "training.eval_data_path: ",
    )
    for sentence in said:
        assert sum(sentence in line for line in problems) == 1, (sentence, problems)
    assert len(problems) == len(said), problems


def test_a_wrong_path_key_is_told_once_and_not_looked_for(tiny):
    code, lines, errors = doctor("actor_rollout.load=[1]", "ref.load=models/nowhere")
    assert code == 2 and not errors, errors
    problems = [line for line in lines if line.startswith("PROBLEM  config")]
    assert sum("load: [1]" in line for line in problems) == 1, problems
    assert sum("models/nowhere does not exist" in line for line in problems) == 1, problems


def test_a_rank_that_does_not_come_is_named_in_time(tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, DOCTOR, "--seconds", "8"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ
            | dict(
                RANK=str(rank),
                WORLD_SIZE="4",
                LOCAL_RANK=str(rank % 2),
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
        )
        for rank in (0, 1, 3)
    ]
    told = [process.communicate(timeout=LONG) for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2], told
    problems = [line for out, _ in told for line in out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 1 and "rank 2 (node 1) did not come within 8 s" in problems[0]
    assert not any("Traceback" in errors for _, errors in told)


def silent_body(rank, size, store, silent):
    """Enter a stage with a time limit, in which `silent` does not take part or does not get
    through."""
    told = []
    roll = RollCall(
        store, Launch("torchrun", rank, size, rank % 2, (0, 0, 1), "", 0), 1.0, told.append
    )
    assert roll.call() == []
    if silent != "missing" or rank != 1:
        with roll.stage("train tp [0, 1, 2]", range(size)):
            time.sleep(3.0 if silent == "missing" or rank == 2 else 0.0)
    time.sleep(3.0 if silent == "stuck" else 0.0)
    return told


@pytest.mark.parametrize(
    ("silent", "said"),
    [
        ("missing", "train tp [0, 1, 2]: no answer within 1 s from rank 1 (node 0)"),
        ("stuck", "rank 2 (node 1) did not get through within 1 s"),
    ],
)
def test_a_silent_rank_of_a_group_is_named_once(silent, said):
    told = run_ranks(silent_body, 3, silent)
    everything = [sentence for sentences in told for sentence in sentences]
    assert len(everything) == 1 and said in everything[0]


TORCH_NPU = """
class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 8)
    mem_get_info = staticmethod(lambda index: (60 * 10**9, 64 * 10**9))
"""


def test_variables_of_npus_are_printed_and_judged(tiny, tmp_path):
    (tmp_path / "torch_npu.py").write_text(TORCH_NPU)
    code, lines, errors = doctor_alone(
        DOCTOR,
        f"output_dir={tmp_path}/run",
        "training.distributed_timeout_minutes=60",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        HCCL_BUFFSIZE="256",
        HCCL_EXEC_TIMEOUT="7200",
        HCCL_CONECT_TIMEOUT="600",
    )
    assert code == 2 and not errors, errors
    said = [line for line in lines if line.split()[1] == "environment"]
    assert any("note     environment  HCCL_BUFFSIZE=256 (as set): MB" in line for line in said)
    assert any("CPU_AFFINITY_CONF=1,lazy_bind:0 (our default): cores" in line for line in said)
    [problem] = [line for line in said if line.startswith("PROBLEM")]
    assert "HCCL_EXEC_TIMEOUT=7200 is not below" in problem
    assert "unset it for 3600 s, or raise training.distributed_timeout_minutes: 60" in problem
    assert any("did you mean HCCL_CONNECT_TIMEOUT?" in line for line in said)


NODE = NodeReport(
    "first",
    "cpu",
    0,
    8,
    [16.0],
    {"torch": "2.13.0"},
    True,
    {"ref.load": "3 files of 100 bytes"},
    "",
)


def test_an_offloaded_optimizer_stays_in_the_memory_of_a_cpu(home):
    plain = look(load(home), 4)
    offloaded = look(load(home, "training.optimizer_offload=true"), 4)
    whole = machine.needed_gigabytes(plain, "cpu")[0]
    # and what visits the device, here all of so small a model
    assert machine.needed_gigabytes(offloaded, "cpu")[0] > whole
    assert machine.needed_gigabytes(offloaded, "npu")[0] <= whole
    [note] = machine.memory_notes(offloaded.config, NODE)
    assert note.startswith("first: training.optimizer_offload saves nothing on a CPU")
    assert machine.memory_notes(plain.config, NODE) == []
    assert machine.memory_notes(offloaded.config, replace(NODE, kind="npu")) == []


def test_memory_devices_and_nodes_that_do_not_suffice_are_named_with_a_way_out(home):
    cfg = load(home)
    needed = machine.needed_gigabytes(look(cfg, 4), "cpu")
    assert len(needed) == 4 and max(needed) == needed[0], "train ranks need most"
    assert machine.check_memory(NODE, dict(enumerate(needed))) == []
    [short] = machine.check_memory(replace(NODE, free_gigabytes=[0.5]), dict(enumerate(needed)))
    assert (
        "4 ranks need about" in short
        and "0.5 GB are free; lower actor_rollout.max_tokens_to_oom" in short
    )
    npus = replace(NODE, kind="npu", devices=2, free_gigabytes=[60.0, 1.0])
    [second] = machine.check_memory(npus, {8: 20.0, 9: 20.0})
    assert "rank 9 needs about 20.0 GB, and its NPU has 1.0 GB free" in second
    # as MindSpeed-LLM's files for NPUs have it
    nccl = load(home, "training.distributed_backend=nccl")
    assert (
        machine.check_devices(nccl, npus, 2) == []
        and "nccl needs CUDAs" in machine.check_devices(nccl, NODE, 2)[0]
    )
    [few] = machine.check_devices(cfg, npus, 4)
    assert "first has 2 NPUs for 4 ranks; start at most 2 a node" in few
    assert machine.check_open_files(replace(NODE, files=2248), 1024, True, "slurm") == []
    [files] = machine.check_open_files(replace(NODE, files=2247), 1024, True, "slurm")
    assert "rank 0 of a world of 1024 needs about 2248 open files" in files
    assert machine.check_open_files(replace(NODE, files=1224), 1024, False, "slurm") == []
    [agent] = machine.check_open_files(replace(NODE, launcher_files=1024), 1024, True, "torchrun")
    assert (
        "torchrun, which every rank connects to" in agent and "run ulimit -n 1124 before" in agent
    )
    other = replace(
        NODE,
        host="second",
        sees_token=False,
        versions={"torch": "2.12.0"},
        inputs={"ref.load": "missing"},
    )
    first = replace(NODE, environment={"HCCL_IF_IP": "10.0.0.1", "HCCL_BUFFSIZE": "256"})
    second = replace(NODE, host="second", environment={"HCCL_IF_IP": "10.0.0.2"})
    [buffer] = machine.check_alike([first, second])
    assert buffer == (
        "HCCL_BUFFSIZE is not set on second and 256 on first; set the same on all nodes"
    )
    version, folder, model = machine.check_alike([NODE, NODE, other])
    assert "torch is 2.12.0 on second and 2.13.0 on first" in version
    assert (
        "second does not see what first writes" in folder
        and "ref.load: looks different on second" in model
    )
