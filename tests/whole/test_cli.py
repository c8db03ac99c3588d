"""The command line: bad input ends with exit code 2 and one sentence, at once; good input
trains."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.patience import LONG
from support.program import run_program

ROOT = Path(__file__).resolve().parents[2]


def main(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run main.py, in a fork of this process; exit code, standard output, standard error."""
    done = run_program(
        ROOT / "r1zero" / "main.py",
        *arguments,
        environment=os.environ | environment,
        folder=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


def main_alone(*arguments: str) -> tuple[int, str, str, float]:
    """The same in an interpreter of its own, and its seconds of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "r1zero" / "main.py"), *arguments],
        text=True,
        timeout=LONG,
        capture_output=True,
        cwd=ROOT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.fixture
def broken(tiny, tmp_path):
    """Paths to things that are wrong, by name."""
    pq.write_table(pa.table({"question": ["1+1?"]}), tmp_path / "no_answer.parquet")
    empty = pa.table(
        {"question": pa.array([], pa.string()), "ground_truth_answer": pa.array([], pa.string())}
    )
    pq.write_table(empty, tmp_path / "empty.parquet")
    shutil.copytree(tiny / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "row.jsonl").write_text(
        '{"question": "1+1?", "ground_truth_answer": "2"}\n{"question": 3}\n'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["actor_rollout.load=models/nowhere"], "models/nowhere"),
        (
            ["actor_rollout.engine=vllm"],
            "engine: vllm needs the package vllm, which is not installed",
        ),
        (["training.train_itrs=6"], "training.train_itrs is unknown; did you mean train_iters?"),
        (["actor_rollout.ppo_mini_batch_size=60"], "ppo_mini_batch_size"),
        (["actor_rollout.data_path={broken}/no_answer.parquet"], "ground_truth_answer"),
        (["actor_rollout.data_path={broken}/empty.parquet"], "empty.parquet"),
        (
            ["actor_rollout.load={broken}/cut", "training.tokenizer_name_or_path=embedded:tiny"],
            "model.safetensors",
        ),
        (["training.prompt_type=qwen_r2"], "qwen_r1"),
        (
            ["actor_rollout.n_samples_per_prompt=1", "actor_rollout.ppo_mini_batch_size=16"],
            "n_samples_per_prompt",
        ),
        (["output_dir=/proc/nowhere"], "output_dir: /proc/nowhere"),
        (["actor_rollout.data_path={broken}/row.jsonl"], "row.jsonl"),
        (
            ["algorithm.verifier_function=[acc, 'nowhere.module:score']"],
            "No module named 'nowhere'",
        ),
    ],
)
def test_bad_input_is_refused_in_sentences(broken, overrides, sentence):
    code, out, errors = main(
        "--config", "tiny", *[text.format(broken=broken) for text in overrides]
    )
    lines = [line for line in errors.splitlines() if line.startswith("r1zero: ")]
    assert code == 2 and sentence in lines[0] and "Traceback" not in errors + out, errors
    assert len(lines) == len(errors.splitlines()), "nothing but sentences"


def test_bad_input_is_refused_at_once(broken):
    """All of it is looked for before torch is imported, the data last."""
    code, _, errors, seconds = main_alone(
        "--config", "tiny", f"actor_rollout.data_path={broken}/no_answer.parquet"
    )
    assert code == 2 and "ground_truth_answer" in errors
    assert seconds < 10  # of CPU, which others on the machine do not add to


def test_a_flag_that_would_be_ignored_or_guessed_is_refused():
    for arguments, sentence in (
        (["--config", "tiny", "--config", "qwen25_7b"], "given 2 times, as tiny and qwen25_7b"),
        (["--dry"], "--dry is no flag; did you mean --dry-run?"),
        (["--config"], "expected one argument"),
    ):
        code, _, errors = main(*arguments)
        assert code == 2 and sentence in errors and "Traceback" not in errors


@pytest.mark.parametrize(("rank", "said"), [(2, ["r1zero: node 1: "]), (3, [])])
def test_what_is_wrong_on_another_node_is_told_by_its_first_rank(rank, said):
    slurm = dict(
        SLURM_PROCID=str(rank),
        SLURM_STEP_NUM_TASKS="4",
        SLURM_STEP_TASKS_PER_NODE="2(x2)",
        SLURM_JOB_ID="1",
        SLURM_LOCALID=str(rank - 2),
        MASTER_ADDR="127.0.0.1",
    )
    code, _, errors = main("--config", "tiny", "training.prompt_type=qwen_r2", **slurm)
    assert code == 2 and [line[:16] for line in errors.splitlines()] == said


def test_a_wrong_world_size_is_refused_by_one_sentence_of_the_job(tiny):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "3",
            str(ROOT / "r1zero" / "main.py"),
            "--config",
            "tiny",
        ],
        text=True,
        capture_output=True,
        timeout=LONG,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("r1zero: ")]
    assert len(lines) == 1 and "3 ranks" in lines[0], done.stderr


def test_check_and_print_world_size_speak_for_the_launcher(tiny):
    assert main_alone("--config", "tiny", "--print-world-size")[:2] == (0, "4\n")
    assert main_alone("--config", "tiny", "--check")[0] == 0
    code, _, errors = main("--config", "tiny", "--check", NPROC_PER_NODE="3")
    assert code == 2 and "3 ranks" in errors


def test_a_dry_run_tells_what_the_loss_does_not_read(tiny):
    keys = ["algorithm.loss=gspo", "actor_rollout.clip_ratio=0.2"]
    code, out, _ = main("--config", "tiny", "--dry-run", *keys)
    assert code == 0
    assert "warning: actor_rollout.clip_ratio: accepted, no effect: the loss gspo takes" in out


@pytest.mark.parametrize(
    "config", ["tiny", "smollm2_135m_gsm8k", "qwen25_7b", "qwen25_7b_one_node", "qwen25_7b_a3"]
)
def test_shipped_configs_pass_a_dry_run_anywhere(tiny, config):
    code, out, errors = main("--config", config, "--dry-run")
    assert code == 0, errors
    assert "samples ->" in out and "GB per rank" in out


def test_a_world_of_one_trains_and_its_run_folder_is_as_documented(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    arguments = ["--config", "tiny", "training.train_iters=2", f"output_dir={folder}"]
    code, out, errors, _ = main_alone(*arguments)
    assert code == 0, errors
    assert "accuracy" in out and str(folder / "model") in out
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    documented = {
        "step",
        "reward/mean",
        "reward/acc",
        "reward/format",
        "reward/failed",
        "response_length/mean",
        "response_length/max",
        "response_truncated",
        "loss",
        "kl",
        "entropy",
        "clip_fraction",
        "grad_norm",
        "lr",
        "mismatch/mean",
        "mismatch/max",
        "time/step",
        "time/rollout",
        "time/reward",
        "time/ref",
        "time/update",
        "time/publish",
        "time/wait/train",
        "time/wait/rollout",
        "time/wait/ref",
        "tokens/prompt",
        "tokens/response",
        "throughput/tokens_per_second",
        "throughput/tokens_per_second_per_rank",
        "publish/bytes",
        "publish/gigabytes_per_second",
        "memory/peak_gigabytes/train",
        "memory/peak_gigabytes/rollout",
        "memory/peak_gigabytes/ref",
        "weights_version",
    }
    assert documented <= set(steps[0])
    rows = pq.read_table(folder / "samples" / "step_000002.parquet").to_pylist()
    assert len(rows) == 128 and rows[0]["weights_version"] == 1
    assert {
        "prompt",
        "response",
        "ground_truth",
        "reward",
        "advantage",
        "truncated",
        "score/acc",
        "outcome/acc",
    } <= set(rows[0])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt", add_special_tokens=False)
    answers = model.generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        do_sample=False,
        max_new_tokens=30,
    )
    text = tokenizer.decode(answers[0])
    assert "<answer>" in text
    # The resolved configuration runs again; the earlier run is kept aside.
    code, out, errors = main("--config", str(folder / "config.yaml"), "training.train_iters=1")
    assert code == 0, errors
    assert f"the earlier run in {folder} is now in {folder}.1" in out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "run.1" / "metrics.jsonl").read_text().splitlines()) == 2
