"""The reference: runs without one, and runs whose reference is reset to the policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import make_runtime, metrics, run, samples

from r1zero.checkpoint import store
from r1zero.checkpoint.reference_state import StoredReference
from r1zero.config.schema import placement
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.observe.alarms import Alarms
from r1zero.preflight.dry_run import groups_table, report
from r1zero.preflight.found import look
from r1zero.preflight.memory import memory
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import resolve
from r1zero.trainer import train
from r1zero.weights.open import open_weights

# Three steps of two updates each.
STEPS = [
    "training.train_iters=3",
    "training.eval_data_path=null",
    "training.global_batch_size=8",
    "actor_rollout.ppo_mini_batch_size=32",
    "actor_rollout.lr=1e-3",
    "actor_rollout.lr_decay_style=constant",  # so that a run may stop earlier
    "reward.workers=1",
]
NO_KL = [*STEPS, "algorithm.kl_ctrl.kl_coef=0"]
NOBODY = "resource_pool.ref=[]"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run wrote."""
    return load_file(folder / "model" / "model.safetensors")


CUT = [
    "actor_rollout.num_gpus_for_train=2",
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.infer_tensor_parallel_size=1",
    "resource_pool.actor_rollout=[4]",
]
COLOCATED = ["resource_pool.colocate=true", "actor_rollout.tensor_model_parallel_size=2"]


@pytest.mark.parametrize(
    ("size", "layout", "size_with", "layout_with"),
    [
        (1, [NOBODY], 1, ["resource_pool.ref=[1]"]),
        (4, [*CUT, NOBODY], 5, [*CUT, "resource_pool.ref=[1]"]),
        # a colocated pool is one: what is named under ref counts as well
        (2, [*COLOCATED, NOBODY], 2, [*COLOCATED, "resource_pool.ref=[1]"]),
    ],
    ids=["one rank", "train TP2, 2 rollout", "colocated"],
)
def test_without_a_reference_the_same_is_learnt(
    tiny, tmp_path, size, layout, size_with, layout_with
):
    """A term of weight 0 adds exact zeros to loss and gradient: weights are equal to the last bit."""
    one = run(tmp_path / "with", size_with, "tiny", [*NO_KL, *layout_with])
    other = run(tmp_path / "without", size, "tiny", [*NO_KL, *layout])
    ours = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(ours[name], value), name
    for step in (1, 2, 3):
        assert samples(other, step) == samples(one, step)
    for line, again in zip(metrics(one), metrics(other), strict=True):
        assert line["kl"] >= 0 and "kl" not in again
        assert line["loss"] == again["loss"] and line["grad_norm"] == again["grad_norm"]
        assert again["invariants/broken"] == 0
        assert ("time/wait/ref" in line) and ("time/wait/ref" not in again)
    assert max(line["kl"] for line in metrics(one)) > 0, "its KL is told"


def test_groups_that_do_not_train_and_parts_are_handed_over_by_rollout(tiny, tmp_path):
    """Two rollout replicas deal to two train replicas what the ref rank dealt before."""
    shared = [
        *NO_KL,
        "training.train_iters=2",
        "training.parts=3",
        "algorithm.equal_groups=skip",
        "algorithm.mask_truncated=true",
        "actor_rollout.num_gpus_for_train=2",
        "resource_pool.actor_rollout=[4]",
    ]
    one = run(tmp_path / "with", 5, "tiny", [*shared, "resource_pool.ref=[1]"])
    other = run(tmp_path / "without", 4, "tiny", [*shared, NOBODY])
    ours = weights(other)
    assert all(torch.equal(ours[name], value) for name, value in weights(one).items())
    for line, again in zip(metrics(one), metrics(other), strict=True):
        assert line["loss"] == again["loss"] and again["invariants/broken"] == 0


def test_a_run_without_a_kl_term_asks_for_no_ref_ranks(tiny):
    cfg, warnings = load_config("tiny", ["algorithm.kl_ctrl.kl_coef=0", "resource_pool.ref=null"])
    assert not cfg.has_reference and cfg.resource_pool.ref == [] and cfg.world_size == 3
    assert any("ref.micro_batch_size: accepted, no effect" in line for line in warnings)
    found = look(cfg)
    assert list(found.placement.roles) == ["train", "rollout"] and found.reference is None
    told = report(found)
    assert not any("ref" in line.split() for line in told.partition("rank  node")[2].splitlines())
    assert "rollout idle" in told, "a step is predicted all the same"

    named, _ = load_config("tiny", ["algorithm.kl_ctrl.kl_coef=0"])
    assert named.has_reference and named.world_size == 4, "ranks that are named tell the KL"
    steered, _ = load_config(
        "tiny",
        [
            "algorithm.kl_ctrl.kl_coef=0",
            "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.target_kl=0.1",
            "algorithm.kl_ctrl.horizon=100",
            "resource_pool.ref=null",
        ],
    )
    assert not steered.has_reference and steered.world_size == 3, "0 stays 0"


def test_files_and_sizes_of_a_reference_that_is_not_loaded_do_not_matter(tiny, tmp_path):
    nothing = [
        "algorithm.kl_ctrl.kl_coef=0",
        "resource_pool.ref=null",
        f"ref.load={tmp_path}/nothing",
        "ref.tensor_model_parallel_size=16",
        f"output_dir={tmp_path}/run",
    ]
    for size in (1, 3):
        assert resolve(load_config("tiny", nothing)[0], (), size).reference is None


def test_a_run_goes_on_without_its_reference_and_with_it_again(tiny, tmp_path):
    """The coefficient is 0, so whether there is one makes no difference to what is learnt."""
    straight = run(tmp_path / "straight", 1, "tiny", [*NO_KL, NOBODY])
    folder = tmp_path / "run"
    stages = (["resource_pool.ref=[1]"], [NOBODY], ["resource_pool.ref=[1]"])
    for last, ranks in enumerate(stages, start=1):
        saved = ["training.save_interval=1", f"training.train_iters={last}"]
        run(folder, 1, "tiny", [*NO_KL, *ranks, *saved])
    with_kl = [line["step"] for line in metrics(folder) if "kl" in line]
    assert with_kl == [1, 3]
    ours = weights(folder)
    assert all(torch.equal(ours[name], value) for name, value in weights(straight).items())
    said = (folder / "logs" / "rank_0000.log").read_text()
    assert "there is no reference" in said and f"the reference is {tiny / 'model'}" in said


# -- resets ---------------------------------------------------------------------------------------

# Four steps of one update, the reference reset after the second and the fourth.
RESETS = [
    "training.train_iters=4",
    "training.eval_data_path=null",
    "training.global_batch_size=8",
    "training.save_interval=1",
    "actor_rollout.ppo_mini_batch_size=64",
    "actor_rollout.lr=1e-3",
    "algorithm.kl_ctrl.kl_coef=0.5",
    "reward.workers=1",
    "ref.reset_interval=2",
]
TRAIN_TP2_PP2 = [
    "actor_rollout.tensor_model_parallel_size=2",
    "actor_rollout.pipeline_model_parallel_size=2",
    "actor_rollout.num_gpus_for_infer=1",
    "actor_rollout.infer_tensor_parallel_size=1",
]
TRAIN_4 = [*TRAIN_TP2_PP2, "actor_rollout.num_gpus_for_train=4", "resource_pool.actor_rollout=[5]"]
TRAIN_8 = [*TRAIN_TP2_PP2, "actor_rollout.num_gpus_for_train=8", "resource_pool.actor_rollout=[9]"]
REF_PP2 = ["resource_pool.ref=[2]", "ref.pipeline_model_parallel_size=2"]
REF_TP2_DP2 = ["resource_pool.ref=[4]", "ref.tensor_model_parallel_size=2"]


def holds_the_policy_of(folder: Path, step: int, shape: ModelConfig, of_step: int) -> bool:
    """Whether the reference in a checkpoint is the policy of another one, to the last bit."""
    checkpoints = folder / "checkpoints"
    reference = StoredReference(checkpoints / f"iter_{step:07d}", shape)
    policy = open_weights(checkpoints / f"iter_{of_step:07d}", shape)
    return all(
        torch.equal(reference.read(tensor), policy.read(tensor)) for tensor in param_table(shape)
    )


@pytest.mark.parametrize(
    ("size", "train_and_ref"),
    [(9 + 2, [*TRAIN_8, *REF_PP2]), (5 + 4, [*TRAIN_4, *REF_TP2_DP2])],
    ids=["train DP2, ref PP2", "ref TP2 DP2"],
)
def test_a_reset_gives_the_reference_the_policy_and_a_run_goes_on_across_it(
    tiny, tmp_path, size, train_and_ref
):
    layout = [*RESETS, *train_and_ref]
    straight = run(tmp_path / "straight", size, "tiny", layout)
    shape = ModelConfig.from_folder(tiny / "model")
    assert holds_the_policy_of(straight, 2, shape, of_step=2)
    assert holds_the_policy_of(straight, 3, shape, of_step=2)
    assert not holds_the_policy_of(straight, 3, shape, of_step=3)
    assert holds_the_policy_of(straight, 4, shape, of_step=4)
    lines = metrics(straight)
    assert [line["reference_version"] for line in lines] == [0, 0, 2, 2]
    # limits of the invariant: both sides compute in fp32, on layouts of their own
    assert abs(lines[0]["kl"]) < 1e-5 and abs(lines[2]["kl"]) < 1e-5
    assert lines[1]["kl"] > 1e-4 and lines[3]["kl"] > 1e-4
    assert not any(line["invariants/broken"] for line in lines)

    # killed after the third step: its checkpoint, which a reset lies before, is the last one
    folder = tmp_path / "again"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "iter_0000004")
    (folder / "checkpoints" / store.TRACKER).write_text("3\n")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    run(folder, size, "tiny", [*layout, "training.async_save=true"])
    ours = weights(folder)
    assert all(torch.equal(ours[name], value) for name, value in weights(straight).items())
    for key in ("kl", "loss", "grad_norm", "reference_version"):
        assert metrics(folder)[3][key] == lines[3][key]
    assert holds_the_policy_of(folder, 4, shape, of_step=4)
    assert (
        "the reference is the policy after step 2"
        in (folder / "logs" / "rank_0000.log").read_text()
    )

    run(elsewhere, 1, "tiny", RESETS)
    # float sums in another order: see tests/whole/test_layouts.py
    assert metrics(elsewhere)[3]["kl"] == pytest.approx(lines[3]["kl"], rel=2e-4)


def test_colocated_ranks_reset_the_reference_too(tiny, tmp_path):
    layout = [
        "resource_pool.colocate=true",
        "actor_rollout.tensor_model_parallel_size=2",
        "actor_rollout.infer_tensor_parallel_size=1",
        "ref.pipeline_model_parallel_size=2",
        "resource_pool.ref=[]",
        "training.train_iters=3",
    ]
    folder = run(tmp_path / "run", 2, "tiny", [*RESETS, *layout])
    assert holds_the_policy_of(folder, 3, ModelConfig.from_folder(tiny / "model"), of_step=2)
    assert abs(metrics(folder)[2]["kl"]) < 1e-5 < metrics(folder)[1]["kl"]


def lost_reset_body(rank, size, store, folder):
    """Train across a reset that does not arrive; returns what ended the run."""
    overrides = [*RESETS, "training.publish_check_interval=0"]
    runtime = make_runtime(store, folder, *overrides, rank=rank, size=size)
    publisher = runtime.reference_publisher
    publisher.publish = lambda version: None
    publisher.difference = lambda: None  # and the comparison of checksums does not see it
    try:
        return train(runtime)
    except RuntimeError as error:
        return str(error)


def test_a_reset_that_did_not_arrive_breaks_the_invariant_of_the_next_step(tiny, tmp_path):
    [ended] = run_ranks(lost_reset_body, 1, str(tmp_path))
    assert ended.startswith("step 3: invariant broken: after its reset the KL to the reference is")


def damaged_reset_body(rank, size, store, folder):
    """Train to a reset after which a weight of the reference changes; returns what ended the run."""
    runtime = make_runtime(store, folder, *RESETS, rank=rank, size=size)
    publish = runtime.reference_publisher.publish

    def and_change_it(version):
        publish(version)
        with torch.no_grad():
            next(runtime.reference.model.module.parameters()).mul_(1.01)

    runtime.reference_publisher.publish = and_change_it
    try:
        return train(runtime)
    except RuntimeError as error:
        return str(error)


def test_a_reset_that_arrives_damaged_is_told_at_once(tiny, tmp_path):
    [ended] = run_ranks(damaged_reset_body, 1, str(tmp_path))
    assert ended.startswith("step 2: invariant broken: after publishing, ")
    assert "on ref rank 0 differs from train rank 0" in ended


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["algorithm.kl_ctrl.kl_coef=0", "resource_pool.ref=null"],
            "ref.reset_interval: 25 resets a reference, but there is none",
        ),
        (
            ["actor_rollout.lora.rank=4", "resource_pool.ref=null"],
            "with actor_rollout.lora it is the model below the adapters",
        ),
        (["training.staleness=1"], "ref.reset_interval: 25 needs training.staleness 0, not 1"),
        (["ref.reset_interval=0"], "ref.reset_interval: 0 must be"),
    ],
)
def test_resets_that_cannot_be_are_refused(tiny, overrides, told):
    with pytest.raises(BadInput) as error:
        resolve(load_config("tiny", ["ref.reset_interval=25", *overrides])[0])
    assert told in str(error.value)


def test_a_reference_of_another_network_is_never_reset(tiny, tmp_path):
    make_model("qwen2", tmp_path, vocab_size=ModelConfig.from_folder(tiny / "model").vocab_size)
    other = [f"ref.load={tmp_path}"]
    with pytest.raises(BadInput, match="is another network than actor_rollout.load"):
        resolve(load_config("tiny", [*other, "ref.reset_interval=25"])[0])
    assert resolve(load_config("tiny", other)[0]).reference is not None


def test_a_checkpoint_whose_reference_was_reset_is_no_reference_of_another_run(tiny, tmp_path):
    folder = run(tmp_path / "run", 1, "tiny", [*RESETS, "training.train_iters=2"])
    checkpoint = folder / "checkpoints" / "iter_0000002"
    with pytest.raises(BadInput, match="was reset after step 2, and only a run that goes on"):
        load_config("tiny", [f"ref.load={checkpoint}"])
    cfg, _ = load_config("tiny", [f"actor_rollout.load={checkpoint}"])
    assert cfg.training.resume == str(checkpoint) and cfg.ref.load == str(tiny / "model")


@pytest.mark.parametrize(("reset_to", "warnings"), [(0, 1), (25, 0)], ids=["never", "reset"])
def test_the_kl_after_a_reset_is_not_compared_with_that_before(reset_to, warnings):
    alarms = Alarms(1e-3, 0.05, lambda steps: None)
    said = []
    for step in range(1, 5):
        row = {"step": step, "reward/mean": 0.2, "time/step": 1.0}
        row |= {"kl": 0.01, "reference_version": 0}
        if step == 4:
            row |= {"kl": 0.2, "reference_version": reset_to}
        said += alarms.look(row)
    assert len(said) == warnings


def test_memory_and_bytes_of_resets_are_estimated(tiny):
    without, _ = load_config("tiny")
    cfg, _ = load_config("tiny", ["ref.reset_interval=25"])
    shape = ModelConfig.from_folder(tiny / "model")
    before = memory(without, placement(without, 4), shape, shape)
    after = memory(cfg, placement(cfg, 4), shape, shape)
    bucket = before["rollout"].buckets
    assert after["train"].buckets == 2 * bucket and after["rollout"].buckets == bucket
    assert after["ref"].buckets == bucket and before["ref"].buckets == 0
    rows = {}
    for resets, found in ((False, without), (True, cfg)):
        table = groups_table(found, placement(found, 4), shape).splitlines()
        rows[resets] = next(line.split() for line in table if line.startswith("ref"))
    assert rows[False][4] == "0" and rows[True][4] == "1", "a group to publish in"
