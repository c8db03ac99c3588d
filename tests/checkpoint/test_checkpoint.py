"""Checkpoints: exact resume, another layout, damage of every kind, failed saves, and what is
kept."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from support.multiproc import run_ranks
from support.patience import LONG
from support.worlds import metrics, resolved_run, run, samples

from r1zero.checkpoint import in_flight, lengths, manager, manifest, train_state
from r1zero.checkpoint import store as checkpoint_store
from r1zero.checkpoint.progress import CheckpointInfo
from r1zero.checkpoint.resume import changes, check_resume, find
from r1zero.checkpoint.retention import Retention
from r1zero.config.load import dump
from r1zero.distributed.shutdown import PreemptionNotice
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.trainer import prepare, train

# Steered coefficients of KL and entropy, a decaying rate with warm-up and weight decay: all the state there is.
RUN = [
    "training.train_iters=4",
    "training.global_batch_size=4",
    "training.eval_data_path=",
    "actor_rollout.micro_batch_size=2",
    "ref.micro_batch_size=1",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=8",
    "training.minibatch_order=expected_length",
    "actor_rollout.weight_decay=0.1",
    "actor_rollout.lr_warmup_iters=2",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.target_kl=0.1",
    "algorithm.kl_ctrl.horizon=100",
    "algorithm.kl_ctrl.kl_coef=0.5",
    "algorithm.entropy_ctrl={type: adaptive, target: 1.0, step: 0.001}",
]
TIMES = ("time/", "throughput/", "memory/", "publish/gigabytes")


class NoticeAfter(PreemptionNotice):
    """A signal that arrives during a step, on one rank."""

    def __init__(self, runtime, step: int, rank: int) -> None:
        super().__init__()
        self.listen_to = runtime, step, rank

    @property
    def asked_by(self) -> str | None:
        runtime, step, rank = self.listen_to
        return "a test" if runtime.progress.step >= step and runtime.world.rank == rank else None

    @asked_by.setter
    def asked_by(self, _: object) -> None:
        pass


def until(
    rank: int, size: int, store: object, overrides: list[str], step: int | None
) -> str | None:
    """Train as main.py does, leaving early after `step`."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    return train(runtime, NoticeAfter(runtime, step, size - 1) if step else None)


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics without what a clock measured."""
    return [
        {key: value for key, value in line.items() if not key.startswith(TIMES)}
        for line in metrics(folder)
    ]


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    """Four steps without interruption, saved after each second one."""
    return run(
        tmp_path_factory.mktemp("straight") / "run", 4, "tiny", [*RUN, "training.save_interval=2"]
    )


@pytest.fixture(scope="module")
def left_early(tiny, tmp_path_factory) -> Path:
    """The same run, left after its second step; to be copied."""
    folder = tmp_path_factory.mktemp("left") / "run"
    stop_after(folder, 2)
    return folder


def stop_after(folder: Path, step: int, *overrides: str) -> None:
    """Leave the run early on another rank's request."""
    reasons = run_ranks(until, 4, [*RUN, *overrides, f"output_dir={folder}"], step)
    assert set(reasons) == {"a test asks to leave"}


@pytest.mark.parametrize(
    "overrides", [[], ["training.async_save=true", "training.save_interval=1"]]
)
def test_resume_is_exact(straight, left_early, tmp_path, overrides):
    folder = tmp_path / "run"
    if overrides:
        stop_after(folder, 2, *overrides)
    else:
        shutil.copytree(left_early, folder)
    assert find(folder / "checkpoints", None).name == "iter_0000002"
    run(folder, 4, "tiny", [*RUN, *overrides])
    assert numbers(folder) == numbers(straight)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert samples(folder, step) == samples(straight, step)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for saved in folder.glob("checkpoints/iter_*[24]"):
        ours, theirs = (
            lengths.read(path / "checkpoints" / saved.name) for path in (folder, straight)
        )
        assert len(ours["longest"]) == 4
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    coefficients = [line["entropy_coefficient"] for line in numbers(folder)]
    np.testing.assert_allclose(coefficients, [0, 0.001, 0.002, 0.003], rtol=1e-6)
    said = (folder / "logs" / "rank_0000.log").read_text()
    assert "resumed from" in said and "step 2 of 4" in said and "weights version 2" in said


def coefficients(rank: int, size: int, store: object, overrides: list[str]) -> tuple[float, float]:
    """Those of KL and entropy that a run goes on with."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    found = runtime.policy.kl.value, runtime.policy.entropy.applied
    runtime.close()
    runtime.hold.release()
    return found


def test_fixed_coefficients_are_what_the_configuration_says_at_each_start(tiny, tmp_path):
    """A run goes on with a KL term and a steered entropy that it did not have, and without both."""
    base = [*RUN, "algorithm.kl_ctrl.type=fixed", f"output_dir={tmp_path}"]
    without = [*base, "algorithm.kl_ctrl.kl_coef=0", "algorithm.entropy_ctrl.type=fixed"]
    held = [*base, "algorithm.kl_ctrl.kl_coef=0.05", "actor_rollout.entropy_coeff=0.01"]
    run_ranks(until, 1, without, 1)
    assert run_ranks(coefficients, 1, held) == [(0.05, 0.01)]
    assert run_ranks(coefficients, 1, [*held, "algorithm.kl_ctrl.type=adaptive"]) == [(0.05, 0.01)]
    run_ranks(until, 1, held, 2)
    assert run_ranks(coefficients, 1, without) == [(0.0, 0.0)]
    assert "KL coefficient 0 (fixed)" in (tmp_path / "logs" / "rank_0000.log").read_text()


def test_a_checkpoint_from_before_the_entropy_was_steered_can_be_read(straight, tmp_path):
    content = json.loads((straight / "checkpoints" / "iter_0000002" / "trainer.json").read_text())
    assert content.pop("entropy_coefficient") == pytest.approx(0.002)
    assert content.pop("entropy_applies") is True
    (tmp_path / "trainer.json").write_text(json.dumps(content))
    assert CheckpointInfo.read(tmp_path).entropy_coefficient is None


@pytest.mark.parametrize(
    "options",
    [
        [
            "training.staleness=1",
            "training.minibatch_order=expected_length",
            "algorithm.old_logprobs=rollout",
            "actor_rollout.ppo_mini_batch_size=8",
        ],
        ["training.staleness=1", "training.updates=accumulate", "training.parts=3"],
    ],
    ids=["minibatches", "one update"],
)
def test_a_run_one_step_off_resumes_exactly_and_on_another_layout(tiny, tmp_path, options):
    """The batch that was drawn ahead goes on from the checkpoint: its weights are gone."""
    whole = run(tmp_path / "whole", 4, "tiny", [*RUN, *options])
    folder = tmp_path / "run"
    stop_after(folder, 2, *options)
    assert list((folder / "checkpoints" / "iter_0000002" / "in_flight").iterdir())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    run(folder, 4, "tiny", [*RUN, *options])
    run(elsewhere, 1, "tiny", [*RUN, *options])
    assert numbers(folder) == numbers(whole)
    for step in (3, 4):
        rows = samples(whole, step)
        assert samples(folder, step) == rows
        assert {row["weights_version"] for row in rows} == {step - 2}
    assert [row["response"] for row in samples(elsewhere, 3)] == [
        row["response"] for row in samples(whole, 3)
    ]
    for ours, theirs in zip(numbers(elsewhere), numbers(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4, abs=2e-6)


def test_what_was_drawn_ahead_is_learnt_from_without_the_reference_that_it_had(tiny, tmp_path):
    folder = tmp_path / "run"
    options = ["training.staleness=1", "resource_pool.ref=null"]
    stop_after(folder, 2, "training.staleness=1")
    none = ["algorithm.kl_ctrl.type=fixed", "algorithm.kl_ctrl.kl_coef=0"]
    run(folder, 1, "tiny", [*RUN, *options, *none])
    with_one, _, without, _ = metrics(folder)
    assert "kl" in with_one and "kl" not in without


def test_every_prompt_is_drawn_once_when_the_size_changes_with_a_batch_on_its_way(tiny, tmp_path):
    """The third step learns from what the checkpoint holds, by its size; the later ones by the new one."""
    options = ["training.staleness=1", "training.no_shuffle=true", "training.minibatch_order=drawn"]
    folder = tmp_path / "run"
    stop_after(folder, 2, *options)
    larger = ["training.global_batch_size=6", "training.train_iters=5"]
    run(folder, 4, "tiny", [*RUN, *options, *larger])
    drawn = [row["prompt_index"] for step in range(1, 6) for row in samples(folder, step)]
    assert drawn == [prompt for prompt in range(4 + 4 + 4 + 6 + 6) for _ in range(4)]


def first_prompts(rank: int, size: int, store: object, overrides: list[str]) -> list[int]:
    """What a run that goes on would draw if the data began anew."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    runtime.progress.prompts_drawn = 0
    drawn = [prompt.index for prompt in runtime.draw(3).prompts]
    runtime.close()
    runtime.hold.release()
    return drawn


def test_prompts_are_dealt_by_the_lengths_that_their_answers_had(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "checkpoints" / checkpoint_store.TRACKER).write_text("2\n")
    tokens: defaultdict[int, int] = defaultdict(int)
    for row in samples(straight, 1):
        tokens[row["prompt_index"]] += row["response_length"]
    (drawn,) = run_ranks(first_prompts, 1, [*RUN, f"output_dir={folder}"])
    assert len(set(tokens.values())) == 4, "no two are alike"
    assert drawn == sorted(tokens, key=lambda index: tokens[index])


def test_steps_after_the_checkpoint_are_taken_again_without_duplicates(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    # going back is writing the tracker
    (folder / "checkpoints" / checkpoint_store.TRACKER).write_text("2\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    before = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    run(folder, 4, "tiny", RUN)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[:2] == before[:2], "what the checkpoint holds is never rewritten"
    assert numbers(folder) == numbers(straight)
    assert len((folder / "logs" / "superseded.jsonl").read_text().splitlines()) >= 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, (1, [])),  # as it was left: 1 rank to train and 2 to roll out
        (
            (
                5,
                [
                    "actor_rollout.num_gpus_for_train=2",
                    "actor_rollout.num_gpus_for_infer=2",
                    "resource_pool.actor_rollout=[4]",
                    "actor_rollout.tensor_model_parallel_size=2",
                    "actor_rollout.infer_tensor_parallel_size=1",
                ],
            ),
            (4, ["actor_rollout.num_gpus_for_train=2", "actor_rollout.num_gpus_for_infer=1"]),
        ),
        (
            (
                4,
                [
                    "resource_pool.colocate=true",
                    "resource_pool.actor_rollout=[4]",
                    "resource_pool.ref=[]",
                    "actor_rollout.tensor_model_parallel_size=2",
                    "actor_rollout.pipeline_model_parallel_size=2",
                    "actor_rollout.infer_tensor_parallel_size=2",
                ],
            ),
            (
                3,
                [
                    "actor_rollout.num_gpus_for_train=1",
                    "actor_rollout.num_gpus_for_infer=1",
                    "resource_pool.actor_rollout=[2]",
                ],
            ),
        ),
    ],
    ids=["4 ranks to 1", "TP2 to DP2, 2 to 1 rollout ranks", "colocated TP2 PP2 to 3 ranks"],
)
def test_resume_onto_another_layout(straight, left_early, tmp_path, first, second):
    folder = tmp_path / "run"
    (new_size, new_layout) = second
    if first is None:
        shutil.copytree(left_early, folder)
    else:
        (size, layout) = first
        run_ranks(until, size, [*RUN, *layout, f"output_dir={folder}"], 2)
    run(folder, new_size, "tiny", [*RUN, *new_layout])
    ours, theirs = numbers(folder), numbers(straight)
    assert len(ours) == 4
    for key in ("loss", "kl", "grad_norm", "reward/mean", "response_length/mean", "lr"):
        assert [line[key] for line in ours] == pytest.approx(
            [line[key] for line in theirs], rel=2e-4, abs=2e-6
        ), key


def test_norms_that_tp_cuts_resume_onto_another_layout(tiny, tmp_path):
    """OLMo 2 trains from end to end; its checkpoint of TP 2 goes on at TP 1 as if it had never
    stopped."""
    model = tmp_path / "olmo2"
    vocabulary = ModelConfig.from_folder(tiny / "model").vocab_size
    make_model("olmo2", model, vocab_size=vocabulary, num_hidden_layers=2)
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, model)
    # A random model's rewards are all alike, and Adam would make steps of the noise that is left of
    # the gradient.
    whole = [
        *RUN,
        "training.train_iters=2",
        f"actor_rollout.load={model}",
        f"ref.load={model}",
        "actor_rollout.entropy_coeff=0.1",
        "actor_rollout.adam_eps=1e-3",
    ]
    cut = [
        "resource_pool.colocate=true",
        "resource_pool.actor_rollout=[2]",
        "resource_pool.ref=[]",
        "actor_rollout.tensor_model_parallel_size=2",
        "actor_rollout.infer_tensor_parallel_size=2",
    ]
    run(tmp_path / "straight", 1, "tiny", whole)
    run_ranks(until, 2, [*whole, *cut, f"output_dir={tmp_path / 'run'}"], 1)
    run(tmp_path / "run", 1, "tiny", whole)
    ours, theirs = numbers(tmp_path / "run"), numbers(tmp_path / "straight")
    assert len(ours) == 2
    for key in ("loss", "kl", "grad_norm", "reward/mean", "response_length/mean"):
        assert [line[key] for line in ours] == pytest.approx(
            [line[key] for line in theirs], rel=2e-4, abs=2e-6
        ), key


def test_a_checkpoint_named_as_load_keeps_the_reference(straight, tmp_path):
    start = load_config("tiny", [])[0].actor_rollout.load
    for load in (straight / "checkpoints", straight / "checkpoints" / "iter_0000002"):
        cfg, _ = load_config("tiny", [f"actor_rollout.load={load}", f"output_dir={tmp_path}"])
        assert (cfg.actor_rollout.load, cfg.ref.load) == (start, start)
    assert find(cfg.checkpoints, cfg.training.resume) == straight / "checkpoints" / "iter_0000002"
    folder = tmp_path / "other"
    run(folder, 4, "tiny", [*RUN, f"actor_rollout.load={load}", f"ref.load={load}"])
    assert numbers(folder) == numbers(straight)[2:]
    # cfg is the plain tiny one
    assert changes(dump(cfg), straight / "checkpoints" / "iter_0000002")


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(straight, tmp_path) -> Path:
    """A copy of the run's checkpoints; damage goes into the newest."""
    shutil.copytree(straight / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints" / "iter_0000004"


def refusal(saved: Path, *overrides: str) -> str:
    """What a run that would go on from there says."""
    [problem] = resume_problems(*RUN, f"output_dir={saved.parents[1]}", *overrides)
    return problem


def resume_problems(*overrides: str) -> list[str]:
    cfg = load_config("tiny", list(overrides))[0]
    actor = look(cfg).actor
    return check_resume(cfg.checkpoints, cfg.training.resume, actor.load, actor.shape)


WAY_OUT = (
    "the complete checkpoint before it is {before}: write 2 into {tracker} to go on from there"
)


def assert_offers_the_one_before(problem: str, saved: Path) -> None:
    assert (
        WAY_OUT.format(
            before=saved.with_name("iter_0000002"), tracker=saved.parent / checkpoint_store.TRACKER
        )
        in problem
    )


def test_a_truncated_file_is_refused(saved):
    shard = saved / "__0_0.distcp"
    size = shard.stat().st_size
    with shard.open("rb+") as file:
        file.truncate(size - 1)
    problem = refusal(saved)
    assert f"{shard} has {size - 1} bytes, but {size} were saved" in problem
    assert_offers_the_one_before(problem, saved)


def test_a_missing_shard_is_refused(saved):
    (saved / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing" in refusal(saved)
    assert_offers_the_one_before(refusal(saved), saved)


def test_a_flipped_byte_is_refused_by_all_ranks(saved):
    with (saved / "__0_0.distcp").open("rb+") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))
    errors = run_ranks(refused, 4, [*RUN, f"output_dir={saved.parents[1]}"])
    assert len(set(errors)) == 1 and "__0_0.distcp differs from what was saved" in errors[0]
    assert_offers_the_one_before(errors[0], saved)


def refused(rank: int, size: int, store: object, overrides: list[str]) -> str:
    with pytest.raises(BadInput) as error:
        until(rank, size, store, overrides, None)
    return str(error.value)


def test_another_model_is_refused(saved, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert "ffn_hidden_size 192" in refusal(saved, f"actor_rollout.load={tmp_path / 'wide'}")


def test_a_tracker_that_points_nowhere_is_refused(saved):
    (saved.parent / checkpoint_store.TRACKER).write_text("9\n")
    problem = refusal(saved)
    assert "names iteration 9" in problem and str(saved) in problem and "write 4 into" in problem


@pytest.mark.parametrize("word", ["iter_0000002", ""])
def test_a_tracker_that_names_nothing_is_refused(saved, word):
    """Mistyped, or cut off with the power: the run must not begin anew."""
    (saved.parent / checkpoint_store.TRACKER).write_text(word)
    assert f"says {word!r}" in refusal(saved) and "write 4 into" in refusal(saved)
    (saved.parent / checkpoint_store.TRACKER).write_text("release")  # of other programs
    assert resume_problems(f"output_dir={saved.parents[1]}") == []


def test_a_checkpoint_that_lost_its_files_is_refused(saved):
    for path in saved.iterdir():
        path.unlink()
    assert "lost files" in refusal(saved)
    assert_offers_the_one_before(refusal(saved), saved)


def test_an_unfinished_checkpoint_is_refused_when_named_and_ignored_when_not(saved):
    (saved / manifest.NAME).unlink()
    assert "never saved to its end" in refusal(saved)
    (saved.parent / checkpoint_store.TRACKER).unlink()
    assert find(saved.parent, None) == saved.with_name("iter_0000002")


class Malicious:
    def __reduce__(self):
        return shutil.rmtree, ("/nowhere",)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "common.pt twice"])
def test_a_malicious_pickle_is_refused_unopened(saved, file):
    if file == ".metadata":
        (saved / file).write_bytes(pickle.dumps(Malicious()))
    elif file == "common.pt":
        torch.save({"optimizer": Malicious()}, saved / file)
    else:
        file = "common.pt"
        with zipfile.ZipFile(saved / file, "a") as archive:
            archive.writestr("other/data.pkl", pickle.dumps(Malicious()))
    files = manifest.read(saved)  # whoever writes such a file also corrects the list
    manifest.write(saved, files | {file: manifest.describe(saved / file)})
    problem = refusal(saved)
    assert f"{saved / file} would run shutil.rmtree when opened" in problem
    assert_offers_the_one_before(problem, saved)


def test_a_resume_path_without_checkpoint_is_refused(saved, tmp_path):
    assert "not a complete checkpoint" in refusal(
        tmp_path / "a" / "b" / "c", f"training.resume={tmp_path}"
    )


# -- saving ----------------------------------------------------------------------------------------


def full_disk(rank: int, size: int, store: object, overrides: list[str], when: str) -> str | None:
    """Train on a disk that is full before a save or while files are written, or that does not give
    back what it took."""
    if when == "before":
        manager.OPTIMIZER_BYTES = 10**12
    elif when == "before, with groups":
        in_flight.size = lambda groups: 10**18 * rank  # of other ranks than the controller, too
    elif when == "reading":

        def broken(path: Path) -> None:
            raise OSError(5, "Input/output error", str(path))

        train_state.describe = broken
    else:
        manager.Writing = type(
            "Full",
            (manager.Writing,),
            {"run": lambda self: setattr(self, "error", "No space left")},
        )
    try:
        return until(rank, size, store, overrides, None)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("when", ["before, with groups", "reading"])
def test_a_failed_save_ends_the_run_if_asked_to(left_early, tmp_path, when):
    folder = shutil.copytree(left_early, tmp_path / "run")
    keys = ["training.save_interval=1", "training.on_save_failure=stop"]
    said = run_ranks(full_disk, 4, [*RUN, f"output_dir={folder}", *keys], when)
    assert said[3].startswith("the checkpoint of step 3 could not be saved: ")
    assert find(folder / "checkpoints", None).name == "iter_0000002"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_failed_save_leaves_the_last_good_one_and_goes_on(straight, left_early, tmp_path, when):
    folder = shutil.copytree(left_early, tmp_path / "run")
    goes_on = [*RUN, f"output_dir={folder}", "training.save_interval=1"]
    assert set(run_ranks(full_disk, 4, goes_on, when)) == {None}
    assert numbers(folder) == numbers(straight)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "iter_0000002",
        checkpoint_store.TRACKER,
    ]
    said = (folder / "logs" / "rank_0000.log").read_text()
    assert (
        f"the last good one is {folder / 'checkpoints' / 'iter_0000002'}; training goes on" in said
    )


def test_the_last_ones_and_every_so_many_are_kept(straight, tmp_path):
    save = tmp_path / "save"
    for iteration in (1, 2, 3, 4, 5, 6):
        partial = checkpoint_store.start(save, iteration)
        manifest.write(partial, {})
        checkpoint_store.publish(partial, iteration)
    (save / "iter_0000000").mkdir()  # of another program
    retention = Retention(keep_last=2, keep_every=3)
    assert [path.name for path in checkpoint_store.prune(save, 6, retention)] == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000004",
    ]
    assert [checkpoint_store.iteration_of(path) for path in checkpoint_store.complete(save)] == [
        3,
        5,
        6,
    ]
    assert checkpoint_store.find(save).name == "iter_0000006" and (save / "iter_0000000").is_dir()


def test_a_kill_while_one_that_is_replaced_is_deleted_leaves_a_whole_one(tmp_path, monkeypatch):
    save = tmp_path / "save"
    for text in ("first", "second"):
        partial = checkpoint_store.start(save, 2)
        (partial / "text").write_text(text)
        manifest.write(partial, {})
        if text == "first":
            checkpoint_store.publish(partial, 2)

    def killed(path, ignore_errors=False):
        if path.is_dir():
            raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        checkpoint_store.publish(partial, 2)
    assert (checkpoint_store.find(save) / "text").read_text() == "second"


def stuck(rank: int, size: int, store: object, overrides: list[str]) -> str | None:
    """Train where no checkpoint can be deleted, as when somebody has a file of it open on a network
    disk."""

    def busy(path: object, ignore_errors: bool = False, **others: object) -> None:
        if "iter_" not in str(path):
            delete(path, ignore_errors, **others)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    delete, shutil.rmtree = shutil.rmtree, busy
    return until(rank, size, store, [*overrides, "training.on_save_failure=stop"], None)


def test_what_cannot_be_deleted_does_not_stand_against_saving(tiny, tmp_path):
    run_ranks(
        stuck,
        1,
        [*RUN, f"output_dir={tmp_path}", "training.save_interval=1", "training.keep_last=1"],
    )
    assert [
        checkpoint_store.iteration_of(path)
        for path in checkpoint_store.complete(tmp_path / "checkpoints")
    ] == [4]


def slow(rank: int, size: int, store: object, overrides: list[str]) -> None:
    """Fail in the step after a save that takes longer than the time limit of the test."""
    train_state.describe = lambda path: time.sleep(4 * LONG)
    with pytest.raises(ZeroDivisionError):
        runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
        draw = runtime.draw
        runtime.draw = lambda step: draw(step) if step == 1 else 1 / 0
        train(runtime)


def test_a_failure_does_not_wait_for_a_save_under_way(tiny, tmp_path):
    run_ranks(
        slow,
        1,
        [*RUN, f"output_dir={tmp_path}", "training.save_interval=1", "training.async_save=true"],
    )
