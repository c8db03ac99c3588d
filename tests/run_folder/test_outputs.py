"""What a run writes: what lies there already, what must not be moved, and the model at the end."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.worlds import metrics, resolved_run, run, train_body

from r1zero import trainer
from r1zero.checkpoint import export as exporting
from r1zero.checkpoint import manager
from r1zero.checkpoint import store as checkpoint_store
from r1zero.config.schema import placement
from r1zero.distributed import shared
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.errors import BadInput
from r1zero.preflight import outputs
from r1zero.preflight.checks import check
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import complete
from r1zero.report.page import open_runs
from r1zero.run_folder import folder as folders
from r1zero.run_folder.claim import take
from r1zero.run_folder.exported import exported_step
from r1zero.run_folder.folder import continue_folder, start_folder
from r1zero.trainer import prepare, train
from r1zero.weights.save_huggingface import write

QUICK = [
    "training.train_iters=2",
    "training.global_batch_size=4",
    "training.eval_data_path=",
    "actor_rollout.micro_batch_size=4",
    "ref.micro_batch_size=4",
    "reward.workers=1",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=16",
]


def problems(folder: Path, *overrides: str, config: str = "tiny") -> list[str]:
    """What a start into `folder` is refused with."""
    return check(load_config(config, [f"output_dir={folder}", *overrides])[0], 4)


def earlier_run(folder: Path) -> Path:
    """What an earlier run without checkpoints leaves, as far as it counts here."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder and what is in them, without those that every start adds to, and what
    Python keeps of the user's own code."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.parent.name not in ("logs", ".owner", "__pycache__")
    }


def test_a_check_names_the_run_that_writes_there_and_a_reader_does_not_ask(tmp_path):
    folder, save = earlier_run(tmp_path / "run"), f"actor_rollout.save={tmp_path / 'save'}"
    hold = take({"output_dir": folder, "actor_rollout.save": tmp_path / "save"}, print)
    [found] = problems(folder, save)
    assert found.startswith(f"output_dir: another run writes into {folder}: process {os.getpid()} ")
    [found] = problems(tmp_path / "other", save)
    assert found.startswith("actor_rollout.save: another run writes into")
    assert len(open_runs([folder])) == 1
    hold.release()
    assert problems(folder, save) == []


# -- what would be moved away ---------------------------------------------------------------------


@pytest.fixture
def inside(tiny, tmp_path) -> Path:
    """An earlier run with everything in its folder that a run can read."""
    folder = earlier_run(tmp_path / "run")
    shutil.copytree(tiny / "model", folder / "model")
    shutil.copy(tiny / "train.parquet", folder / "train.parquet")
    shutil.copy(load_config("tiny")[0].training.prompt_type_path, folder / "templates.json")
    (folder / "mine.py").write_text("def score(cases):\n    return [1.0 for case in cases]\n")
    (folder / "mine.yaml").write_text(Path("configs/tiny.yaml").read_text())
    (tmp_path / "elsewhere").symlink_to(folder / "model")
    (folder / "base").symlink_to(tiny / "model")
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout.load", "{run}/model"),
        ("actor_rollout.load", "{run}/../elsewhere"),
        ("actor_rollout.load", "{run}/base"),
        ("ref.load", "{run}/model"),
        ("training.tokenizer_name_or_path", "{run}/model"),
        ("actor_rollout.data_path", "{run}/train.parquet"),
        ("actor_rollout.data_path", "0.5,embedded:tiny,0.5,{run}/train.parquet"),
        ("training.eval_data_path", "{run}/train.parquet"),
        ("training.prompt_type_path", "{run}/templates.json"),
        ("algorithm.verifier_function", "[acc, '{run}/mine.py:score']"),
    ],
)
def test_what_would_be_moved_aside_with_the_earlier_run_is_refused(inside, key, value):
    before = tree(inside)
    value = value.format(run=inside)
    if "embedded" in value:
        value = value.replace("embedded:tiny", load_config("tiny")[0].actor_rollout.data_path)
    found = problems(inside, f"{key}={value}")
    assert len(found) == 1 and found[0].startswith(f"{key}: "), found
    assert "would be moved aside" in found[0]
    assert str(inside.with_name("run.1")) in found[0] and tree(inside) == before
    assert problems(inside.with_name("other"), f"{key}={value}") == []


def test_what_a_named_data_set_reads_is_refused_there_too(inside):
    own = f"training.evaluation.own={{path: embedded:tiny, verifier_function: ['{inside}/mine.py:score']}}"
    [found] = problems(inside, own)
    assert found.startswith("training.evaluation.own.verifier_function: ")
    [found] = problems(inside, f"training.evaluation.own={inside}/train.parquet")
    assert found.startswith("training.evaluation.own.path: ")


def test_a_config_file_there_is_refused_but_for_the_one_that_the_run_writes(inside):
    [found] = problems(inside, config=str(inside / "mine.yaml"))
    assert found.startswith(f"--config: {inside}/mine.yaml lies in")
    shutil.copy(inside / "mine.yaml", inside / "config.yaml")
    assert problems(inside, config=str(inside / "config.yaml")) == []


def test_a_checkpoint_there_is_refused_when_this_run_saves_elsewhere(inside, tmp_path):
    partial = checkpoint_store.start(inside / "checkpoints", 3)
    checkpoint_store.manifest.write(partial, {})
    checkpoint_store.publish(partial, 3)
    cfg = load_config(
        "tiny",
        [
            f"output_dir={inside}",
            f"actor_rollout.save={tmp_path / 'save'}",
            f"training.resume={inside / 'checkpoints'}",
        ],
    )[0]
    assert outputs.check_moved(cfg)[0].startswith(f"training.resume: {inside}/checkpoints lies in")


def test_the_controller_looks_once_more_before_it_moves_anything(inside):
    """The earlier run may have been there only after the check."""
    (inside / "metrics.jsonl").rename(inside / "hidden")
    shutil.rmtree(inside / "model")
    words = [*QUICK, f"output_dir={inside}", f"actor_rollout.data_path={inside}/train.parquet"]
    assert check(load_config("tiny", words)[0], 1) == []
    (inside / "hidden").rename(inside / "metrics.jsonl")
    before = tree(inside)
    [said] = run_ranks(refused, 1, words)
    assert "would be moved aside" in said
    assert tree(inside) == before


def refused(rank: int, size: int, store: object, words: list[str]) -> str:
    cfg = load_config("tiny", words)[0]
    launch = Launch("single", rank, size, 0, tuple(range(size)), "", 0)
    world = World(launch, placement(cfg, size), DEVICE, timedelta(seconds=LONG), store)
    with pytest.raises(BadInput) as error:
        prepare(complete(look(cfg, size)), world)
    return str(error.value)


# -- how it is moved ------------------------------------------------------------------------------


def test_the_earlier_run_behind_a_link_is_moved_where_it_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    earlier_run(tmp_path / "disk" / "real")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    said = start_folder(link, "new: 1\n")
    assert said == [f"the earlier run in {link} is now in {tmp_path}/disk/real.1"]
    assert link.is_symlink() and (link / "config.yaml").read_text() == "new: 1\n"
    assert (tmp_path / "disk" / "real.1" / "metrics.jsonl").exists()
    assert not (tmp_path / "disk" / "real" / "metrics.jsonl").exists()


def test_a_move_that_was_interrupted_is_finished_by_the_next_start(tmp_path, monkeypatch):
    folder = earlier_run(tmp_path / "run")
    (folder / "samples").mkdir()
    (folder / "config.yaml").write_text("old: 1\n")
    rename, left = Path.rename, iter(range(2))

    def killed(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(folders.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        start_folder(folder, "new: 1\n")
    monkeypatch.undo()
    (tmp_path / "run.1").mkdir()  # somebody else's
    assert start_folder(folder, "new: 1\n") == [f"the earlier run in {folder} is now in {folder}.2"]
    assert sorted(os.listdir(tmp_path / "run.2")) == ["config.yaml", "metrics.jsonl", "samples"]
    assert sorted(os.listdir(folder)) == ["config.yaml", "logs"]


def test_an_earlier_run_that_cannot_be_moved_is_refused(tmp_path, monkeypatch):
    """As where the run folder is a disk of its own, mounted there."""
    folder = earlier_run(tmp_path / "run")
    stat = os.stat

    def mounted(path: object, **how: object) -> os.stat_result:
        return stat("/proc" if path == folder else path, **how)

    monkeypatch.setattr(os, "stat", mounted)
    [found] = problems(folder)
    assert found.startswith(
        f"output_dir: the earlier run in {folder} cannot be moved aside, "
        f"to {folder}.1 (another disk begins there)"
    )


@pytest.mark.parametrize(
    "name", ["step_000001 (copy).parquet", "step_.parquet", "step_old.parquet", "step_9.parquet"]
)
def test_only_the_samples_of_later_steps_are_removed(tmp_path, name):
    samples = earlier_run(tmp_path / "run") / "samples"
    samples.mkdir()
    for kept in (name, "step_000001.parquet", "step_1000002.parquet"):
        (samples / kept).touch()
    continue_folder(tmp_path / "run", "", 1)
    assert sorted(path.name for path in samples.iterdir()) == sorted([name, "step_000001.parquet"])


# -- where the model will be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["a file", "a folder of something", "another model", "the base model", "a link to it"]
)
def test_what_is_in_the_way_of_the_model_is_told_before_the_first_step(tiny, tmp_path, what):
    place, overrides = tmp_path / "run" / "model", []
    place.parent.mkdir()
    if what == "a file":
        place.touch()
    elif what == "a folder of something":
        place.mkdir()
        (place / "notes.txt").write_text("hi")
    elif what == "a link to it":
        place.symlink_to(tiny / "model")
    else:
        shutil.copytree(tiny / "model", place)
        overrides = [f"actor_rollout.load={place}"] * (what == "the base model")
    before = tree(tmp_path)
    [found] = problems(tmp_path / "run", *overrides)
    assert found.startswith(f"output_dir: {place} ")
    assert "move it, or name another output_dir" in found
    assert tree(tmp_path) == before
    if what not in ("the base model", "a link to it"):
        earlier_run(tmp_path / "other")
        place.rename(tmp_path / "other" / "model")
        assert problems(tmp_path / "other", *overrides) == [], "it will be moved aside"


def test_room_for_the_model_and_a_checkpoint_is_looked_for(tmp_path, monkeypatch):
    parameters = look(load_config("tiny")[0]).actor.shape.num_parameters

    def with_room(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    with_room(4 * parameters)
    assert problems(tmp_path / "run") == []
    [found] = problems(tmp_path / "run", "training.save_interval=1")
    assert "GB for the trained model and a checkpoint" in found
    with_room(4 * parameters - 1)
    assert "free and needs" in problems(tmp_path / "run")[0]
    assert problems(tmp_path / "run", "training.bf16=true") == []


# -- the model at the end, and the start after it -------------------------------------------------


def spoiled(rank: int, size: int, store: object, words: list[str], way: str) -> str:
    """Train where the model cannot be written at the end; returns what that said."""
    cfg = load_config("tiny", words)[0]
    calls = []

    def full(folder: Path, files: list, stream: Iterator) -> None:
        calls.append(folder)
        if way == "disk full" or len(calls) == 1:
            next(stream)  # some of it was written
            raise OSError(28, "No space left on device")
        write(folder, files, stream)

    if way == "in the way":
        exporting.in_the_way = lambda folder, source, may_replace: "a file lies there"
    else:
        exporting.write = full
    if way == "no checkpoint either":
        manager.OPTIMIZER_BYTES = 10**15
    world = World(
        Launch("single", rank, size, 0, (0,) * size, "", 0),
        placement(cfg, size),
        DEVICE,
        timedelta(seconds=LONG),
        store,
    )
    runtime = prepare(complete(look(cfg, size)), world)
    with pytest.raises(RuntimeError) as error:
        train(runtime)
    return str(error.value)


@pytest.mark.parametrize(("size", "way"), [(1, "disk full"), (4, "disk full"), (1, "in the way")])
def test_a_model_that_cannot_be_written_is_kept_as_a_checkpoint_and_written_by_the_next_start(
    tiny, tmp_path, size, way
):
    folder, words = tmp_path / "run", [*QUICK, f"output_dir={tmp_path / 'run'}"]
    said = run_ranks(spoiled, size, words, way)
    reason = "No space left on device" if way == "disk full" else "a file lies there"
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"the model could not be written to {folder}/model: {reason}; its "
        f"weights are in {folder}/checkpoints/iter_0000002: "
    )
    assert not (folder / "model").exists() and not list(folder.glob(".model*"))
    run_ranks(train_body, size, "tiny", words)
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert log.count("step 1/2") == 1 and "nothing left to train: step 2 of 2" in log
    straight = run(tmp_path / "straight", size, "tiny", QUICK)
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()


def test_a_model_that_has_no_other_place_goes_to_another_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    [said] = run_ranks(spoiled, 1, [*QUICK, f"output_dir={folder}"], "no checkpoint either")
    [refuge] = tmp_path.glob("tiny-step-2-*")
    assert f"nor a checkpoint to {folder / 'checkpoints'}; it is in {refuge} now" in said
    straight = run(tmp_path / "straight", 1, "tiny", QUICK)
    assert (refuge / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()


def test_a_model_folder_that_is_a_link_stays_one(tiny, tmp_path):
    place = tmp_path / "disk" / "model"
    place.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(place)
    run(tmp_path / "run", 1, "tiny", QUICK)
    assert (tmp_path / "run" / "model").is_symlink() and exported_step(place) == 2
    assert os.listdir(place.parent) == ["model"]


def test_a_finished_run_started_again_says_so_and_writes_nothing(tiny, tmp_path):
    folder, save = tmp_path / "run", "training.save_interval=2"
    run(folder, 1, "tiny", [*QUICK, save])
    assert exported_step(folder / "model") == 2 and len(metrics(folder)) == 2
    before = tree(folder)
    for iters in (2, 1):
        run(folder, 1, "tiny", [*QUICK, save, f"training.train_iters={iters}"])
        log = (folder / "logs" / "rank_0000.log").read_text().splitlines()
        assert f"nothing left to do: step 2 of {iters}, and its model is in {folder}" in log[-1]
    assert tree(folder) == before
    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])  # damaged since
    run(folder, 1, "tiny", [*QUICK, save])
    assert weights.read_bytes() == whole
    run(folder, 1, "tiny", [*QUICK, save, "training.train_iters=4"])
    assert exported_step(folder / "model") == 4 and len(metrics(folder)) == 4


def opens_its_log_late(rank: int, size: int, store: object, overrides: list[str]) -> bool:
    """Whether there is a runtime, where rank 0 is the first by far."""
    start_logging = trainer.start_logging

    def late(*args: object, **options: object) -> None:
        time.sleep(rank)
        start_logging(*args, **options)

    trainer.start_logging = late
    return prepare(*resolved_run(rank, size, store, "tiny", overrides)) is not None


def test_a_finished_run_waits_for_all_ranks_before_it_gives_its_folder_back(tiny, tmp_path):
    two = ["resource_pool.colocate=true", "resource_pool.actor_rollout=[2]", "resource_pool.ref=[]"]
    overrides = [*QUICK, *two, "actor_rollout.micro_batch_size=1", "ref.micro_batch_size=1"]
    overrides += ["training.save_interval=2", f"output_dir={tmp_path / 'run'}"]
    run(tmp_path / "run", 2, "tiny", overrides)
    assert run_ranks(opens_its_log_late, 2, overrides) == [False, False]


# -- on several nodes -----------------------------------------------------------------------------


def on_its_own_node(rank: int, size: int, store: object, words: list[str], nodes: list[str]) -> str:
    os.chdir(nodes[rank])
    shared.SECONDS = 0.5
    return refused(rank, size, store, words)


def test_a_run_folder_that_is_not_shared_is_told_and_leaves_nothing_behind(tiny, tmp_path):
    nodes = [str(tmp_path / f"n{node}") for node in range(2)]
    for node in nodes:
        os.mkdir(node)
    words = [*QUICK, "resource_pool.colocate=true"]
    said = run_ranks(on_its_own_node, 2, [*words, "output_dir=runs/x"], nodes)
    assert set(said) == {
        "output_dir is not shared: node 1 does not see what rank 0 made in "
        "runs/x; name a folder that all nodes share by an absolute path"
    }
    assert os.listdir(nodes[1]) == []
    shared_but_save = [*words, f"output_dir={tmp_path / 'x'}", "actor_rollout.save=save"]
    said = run_ranks(on_its_own_node, 2, shared_but_save, nodes)
    assert said[1].startswith("actor_rollout.save is not shared: node 1")


def test_a_node_that_sees_the_folder_late_waits_for_it(tmp_path, monkeypatch):
    """As on NFS. A folder of the same name that another rank 0 made is none."""
    path = tmp_path / "run" / ".owner" / "0000001.json"
    path.parent.mkdir(parents=True)
    path.write_text("of another start")
    timer = threading.Timer(0.7, path.write_text, ("of this one",))
    timer.start()
    began = time.monotonic()
    assert shared._sees(path, "of this one") and time.monotonic() - began > 0.6
    monkeypatch.setattr(shared, "SECONDS", 0.3)
    assert not shared._sees(path, "of a third")
