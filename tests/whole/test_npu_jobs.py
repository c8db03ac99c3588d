"""The NPU path, whole jobs: on a stand-in for torch_npu (tests/npu_standin), not on hardware.

The names say which adaptor of Megatron ran: `minimal`, or `mindspeed` with R1ZERO_MINDSPEED=CLONE.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.models import make_model
from support.npu_kernels import missing_kernels
from support.npu_worlds import environment
from support.tiny_reward_models import make_reward_model
from support.worlds import SHORT, metrics, run, samples

from r1zero.models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
# Sums of fp32 in another order, by other kernels; the second step carries the difference on.
TOLERANCE = 2e-4
COMPARED = ("reward/mean", "loss", "kl", "entropy", "grad_norm", "response_length/mean")
# Mean difference of log-probs in bf16; a wrong cache or mask gives more than 0.1.
BF16_MISMATCH = 5e-3
# Two steps of two updates, 32 samples each.
JOB = [*SHORT, "training.global_batch_size=8"]


def colocated(ranks: int, *overrides: str) -> list[str]:
    """All roles on all ranks."""
    world = [f"resource_pool.actor_rollout=[{ranks}]", "resource_pool.ref=[]"]
    return ["resource_pool.colocate=true", *world, *overrides]


@pytest.fixture(scope="module")
def on_cpu(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two steps on the CPU in fp32, by one rank."""
    return run(tmp_path_factory.mktemp("cpu") / "run", 1, "tiny", JOB)


def responses(folder: Path, step: int) -> list[str]:
    return [sample["response"] for sample in samples(folder, step)]


def assert_same(expected: Path, found: Path, steps: Sequence[int] = (1, 2)) -> None:
    """Every sample of every step is the same, and what was learnt within float error."""
    for step in steps:
        theirs = samples(expected, step)
        ours = samples(found, step)
        assert len(ours) == len(theirs) == 32
        for one, other in zip(theirs, ours, strict=True):
            for key in ("prompt", "response", "reward", "truncated"):
                assert one[key] == other[key], (step, key, one, other)
    for one, other in zip(metrics(expected), metrics(found), strict=True):
        for key in COMPARED:
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE, abs=TOLERANCE), key
        assert other["mismatch/max"] < 1e-3


# Each is compared with the CPU, sample by sample.
LAYOUTS = {
    "4 ranks: 2 rollout, 1 train, 1 ref": (4, []),
    "train TP2 sequence parallel and recomputed, rollout TP2": (
        2,
        colocated(
            2,
            "actor_rollout.tensor_model_parallel_size=2",
            "actor_rollout.infer_tensor_parallel_size=2",
            "actor_rollout.recompute_granularity=full",
            "training.sequence_parallel=true",
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_gives_the_samples_of_the_cpu(npu, on_cpu, tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    assert_same(on_cpu, npu.train(tmp_path / "run", ranks, JOB + overrides, fp32=True))


def test_resets_of_a_reference_on_two_stages_give_the_samples_of_the_cpu(npu, tmp_path):
    """The last stage has its copy of the tied embedding from the first."""
    job = [
        *JOB,
        "ref.reset_interval=1",
        "training.save_interval=1",
        "algorithm.kl_ctrl.kl_coef=0.5",
    ]
    cut = ["actor_rollout.pipeline_model_parallel_size=2", "ref.pipeline_model_parallel_size=2"]
    expected = run(tmp_path / "cpu", 1, "tiny", job)
    found = npu.train(tmp_path / "npu", 2, [*job, *colocated(2, *cut)], fp32=True)
    assert_same(expected, found)
    assert [step["reference_version"] for step in metrics(found)] == [0, 1]
    files = found / "checkpoints" / "iter_0000002" / "reference"
    assert len(list(files.iterdir())) == 2, "one a stage"


def test_a_reward_model_on_two_ranks_gives_the_values_of_the_cpu(npu, tiny, tmp_path):
    judge = make_reward_model(tiny, tmp_path / "judge")
    job = [
        *JOB,
        "training.train_iters=1",
        "resource_pool.reward=[1]",
        f"reward.load={judge}",
        "reward.micro_batch_size=4",
    ]
    cut = colocated(2, "reward.tensor_model_parallel_size=2")
    expected = samples(run(tmp_path / "cpu", 1, "tiny", job), 1)
    found = samples(npu.train(tmp_path / "npu", 2, [*job, *cut], fp32=True), 1)
    for one, other in zip(expected, found, strict=True):
        assert one["response"] == other["response"]
        for key in ("score/model", "reward"):
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE, abs=TOLERANCE)


def one_step_of(family: str, folder: Path, tiny: Path, **sizes: int) -> list[str]:
    """One step of a random model of this family with the tiny model's tokenizer."""
    vocabulary = ModelConfig.from_folder(tiny / "model").vocab_size
    make_model(family, folder, vocab_size=vocabulary, **sizes)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, folder)
    return [*JOB, f"actor_rollout.load={folder}", f"ref.load={folder}", "training.train_iters=1"]


def test_experts_on_two_ranks_give_the_samples_of_the_cpu(npu, tiny, tmp_path):
    """Of Qwen3's block, with its norms of queries and keys."""
    job = one_step_of("qwen3_moe", tmp_path / "mixture", tiny)
    expected = run(tmp_path / "cpu", 1, "tiny", job)
    cut = colocated(
        2,
        "actor_rollout.expert_model_parallel_size=2",
        "actor_rollout.infer_expert_parallel_size=2",  # by two replicas
    )
    assert_same(expected, npu.train(tmp_path / "npu", 2, job + cut, fp32=True), steps=[1])


def test_latents_in_graphs_on_two_ranks_give_the_samples_of_the_cpu(npu, tiny, tmp_path):
    """Of DeepSeek-V3, with the sizes that the fused operator takes; three heads a rank it does not,
    and they are padded."""
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }
    job = one_step_of("deepseek_v3", tmp_path / "latent", tiny, **sizes)
    expected = run(tmp_path / "cpu", 1, "tiny", job)
    cut = ["actor_rollout.infer_tensor_parallel_size=2", "actor_rollout.decode_graphs=true"]
    found = npu.train(tmp_path / "npu", 2, job + colocated(2, *cut), fp32=True)
    assert_same(expected, found, steps=[1])


@pytest.fixture(scope="module")
def plain(npu, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps in bf16, which is all that NPUs decode in."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return npu.train(folder, 1, [*JOB, "actor_rollout.decode_graphs=false"])


def test_graphs_draw_the_samples_of_plain_decoding(npu, plain, tmp_path):
    graphs = npu.train(tmp_path / "graphs", 1, [*JOB, "actor_rollout.decode_graphs=true"])
    for step in (1, 2):
        assert responses(plain, step) == responses(graphs, step)
    assert all(step["mismatch/mean"] < BF16_MISMATCH for step in metrics(graphs))


def test_every_operator_that_ran_has_a_kernel(npu, plain):
    """Of this job, and of all before it."""
    ran = npu.kernels()
    assert {"aten::mm.out", "aten::_softmax.out"} <= ran, "not all is recorded"
    assert missing_kernels(ran) == []


def test_the_control_plane_sums_in_float64(npu):
    """MindSpeed's all_reduce throws away the sum of a float64 tensor, over gloo, too."""
    assert npu.run("sum_in_float64", 2) == [0 / 3 + 1 / 3 + 1 + 1 / 3] * 2


def test_torchrun_trains_in_bf16_by_itself_and_evaluates(npu, tiny, tmp_path):
    """The command of the README, on four ranks."""
    job = [*JOB, "training.train_iters=1", "training.eval_data_path=embedded:tiny"]
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    program = [str(ROOT / "r1zero" / "main.py"), "--config", "tiny"]
    done = subprocess.run(
        [*starter, *program, *job, f"output_dir={tmp_path / 'run'}"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert " on npu" in done.stdout
    [step] = metrics(tmp_path / "run")
    assert 1e-6 < step["mismatch/mean"] < BF16_MISMATCH
    scored = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert len(scored) == 2  # before the first step and after the last
