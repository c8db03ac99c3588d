"""Which checkpoints are kept, and runs that end, or write models, on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.multiproc import run_ranks
from support.worlds import resolved_run, run

from r1zero.checkpoint import store
from r1zero.checkpoint.progress import CheckpointInfo, TrainerState
from r1zero.checkpoint.retention import Retention
from r1zero.distributed.shutdown import PreemptionNotice
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.trainer import prepare, train
from r1zero.types import Drawn
from r1zero.weights.open import open_weights

# Six steps of 16 samples, each saved and evaluated.
RUN = [
    "training.train_iters=6",
    "training.global_batch_size=4",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=8",
    "training.eval_interval=1",
    "training.save_interval=1",
]


# -- the rule -------------------------------------------------------------------------------------

SCORES = {1: 1.0, 2: 5.0, 3: None, 4: 2.0, 5: 5.0, 6: 1.0}


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"keep_last": None, "keep_best": 1}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last": 1}, [6]),
        ({"keep_last": 1, "keep_best": 1}, [2, 6]),
        ({"keep_last": 1, "keep_best": 2}, [2, 5, 6]),
        ({"keep_last": 1, "keep_best": 4}, [1, 2, 4, 5, 6]),
        ({"keep_last": 2, "keep_every": 3, "keep_best": 1}, [2, 3, 5, 6]),
    ],
)
def test_the_newest_those_of_every_so_many_steps_and_the_best_are_kept(
    keys: dict, kept: list[int]
) -> None:
    found = {}
    for step, score in SCORES.items():
        found[step] = None if score is None else {"pass@1": score, "other": -score}
    spare = Retention(**keys, best_score="pass@1").spare(found)
    assert [step for step in SCORES if step not in spare] == kept and spare == sorted(spare)


def test_a_score_is_reached_when_all_of_them_are() -> None:
    done = TrainerState(step=3, scores={"pass@1": 0.5, "math/pass@1": 0.4})
    assert done.has_reached({"pass@1": 0.5})
    assert done.has_reached({"pass@1": 0.5, "math/pass@1": 0.1})
    assert not done.has_reached({"pass@1": 0.5, "math/pass@1": 0.41})
    assert not done.has_reached({}), "no score ends nothing"
    done.advance(Drawn(4, 4, 4))
    assert not done.has_reached({"pass@1": 0.5}), "a step that is not evaluated"


# -- worlds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small evaluation sets, of which the second says what is best."""
    folder = tmp_path_factory.mktemp("few")
    for name, first in (("some", 0), ("others", 60)):
        table = pq.read_table(tiny / "eval.parquet").slice(first, 60)
        pq.write_table(table, folder / f"{name}.parquet")
    return [
        f"training.eval_data_path={folder}/some.parquet",
        f"training.evaluation.others={folder}/others.parquet",
    ]


class NoticeAfter(PreemptionNotice):
    """A signal that arrives during a step."""

    def __init__(self, runtime, step: int) -> None:
        super().__init__()
        self.listen_to = runtime, step

    @property
    def asked_by(self) -> str | None:
        runtime, step = self.listen_to
        return "a test" if runtime.progress.step >= step else None

    @asked_by.setter
    def asked_by(self, _: object) -> None:
        pass


def until(rank: int, size: int, store: object, overrides: list[str], step: int) -> None:
    """Train as main.py does, leaving early after `step`."""
    runtime = prepare(*resolved_run(rank, size, store, "tiny", overrides))
    train(runtime, NoticeAfter(runtime, step))


def scores(folder: Path) -> dict[int, dict[str, float]]:
    """The scores of each evaluation, by step."""
    lines = (folder / "evaluation.jsonl").read_text().splitlines()
    return {entry.pop("step"): entry for entry in map(json.loads, lines)}


def best_of(found: dict[int, dict[str, float]], key: str, steps: Sequence[int]) -> list[int]:
    return sorted(steps, key=lambda step: (-found[step][key], step))


def test_the_best_checkpoints_and_models_survive_a_resume(
    tiny: Path, few: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [
        *RUN,
        *few,
        "training.keep_last=1",
        "training.keep_best=2",
        "training.best_score=others/reward/mean",
        "training.export_interval=1",
    ]
    run_ranks(until, 4, [*options, f"output_dir={folder}"], 4)
    run(folder, 4, "tiny", options)
    found = scores(folder)
    assert list(found) == [0, 1, 2, 3, 4, 5, 6]
    key = "others/reward/mean"
    best = best_of(found, key, range(1, 7))[:2]
    saved = store.complete(folder / "checkpoints")
    assert {store.iteration_of(path) for path in saved} == {6, *best}
    for path in saved:
        kept = CheckpointInfo.read(path).progress
        assert kept.scores == found[kept.step]
    best_model = best_of(found, key, range(1, 6))[:2]  # that of step 6 is in model/
    models = {path.name for path in (folder / "exports").iterdir()}
    assert models == {f"step_{step:06d}" for step in {5, *best_model}}
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert f"best checkpoint: {folder}/checkpoints/iter_{best[0]:07d}, {key} " in log


@pytest.fixture(scope="module")
def stopped(tiny: Path, few: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that reaches its scores with the first evaluation after the start, in step 2, and writes
    a model in each step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop = ["training.stop_at={pass@1: 0.0, others/reward/mean: -5}", "training.export_interval=1"]
    return run(folder, 4, "tiny", [*RUN, *few, "training.eval_interval=2", *stop])


def test_a_model_on_the_way_is_that_of_the_checkpoint(stopped: Path, tiny: Path) -> None:
    [exported] = (stopped / "exports").iterdir()
    assert exported.name == "step_000001", "that of step 2 is in model/"
    shape = ModelConfig.from_folder(tiny / "model")
    of_export = dict(_tensors(exported, shape))
    for name, tensor in _tensors(stopped / "checkpoints" / "iter_0000001", shape):
        assert torch.equal(of_export[name], tensor), name
    last = load_file(stopped / "model" / "model.safetensors")
    first = load_file(exported / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in last), "it learnt since"
    beside = {path.name for path in exported.iterdir()}
    assert beside == {path.name for path in (stopped / "model").iterdir()}
    assert {"generation_config.json", "tokenizer.json", "config.json"} <= beside
    for name in beside - {"model.safetensors", "r1zero.json"}:
        assert (exported / name).read_bytes() == (stopped / "model" / name).read_bytes()


def _tensors(folder: Path, shape: ModelConfig) -> list[tuple[str, torch.Tensor]]:
    stream = open_weights(folder, shape).stream(param_table(shape), FIRST, WHOLE, torch.float32)
    return [(spec.name, tensor.clone()) for spec, tensor in stream]


def test_training_ends_at_its_score_and_goes_on_when_that_is_raised(
    stopped: Path, few: list[str], tmp_path: Path
) -> None:
    step_2 = scores(stopped)[2]
    mark = json.loads((stopped / "model" / "r1zero.json").read_text())
    assert mark == {"step": 2, "scores": step_2}
    assert store.find(stopped / "checkpoints").name == "iter_0000002"
    assert (stopped / "report.html").is_file()
    options = [*RUN, *few, "training.eval_interval=2"]
    reached = "training.stop_at={pass@1: 0.0}"
    run(stopped, 4, "tiny", [*options, reached])
    log = (stopped / "logs" / "rank_0000.log").read_text()
    assert "stopped after step 2 of 6: training.stop_at is reached" in log
    assert "nothing left to do: step 2 of 6, where training.stop_at is reached" in log
    (stopped / "model" / "model.safetensors").unlink()
    run(stopped, 4, "tiny", [*options, reached])
    assert (stopped / "model" / "model.safetensors").is_file(), "only the model was missing"
    assert list(scores(stopped)) == [0, 2]
    run(stopped, 4, "tiny", [*options, "training.stop_at={pass@1: 2.0}", "training.train_iters=3"])
    assert list(scores(stopped)) == [0, 2, 3]


def blocked(rank: int, size: int, store: object, overrides: list[str]) -> str:
    """Train where no model on the way can be written."""
    with pytest.raises(RuntimeError) as error:
        train(prepare(*resolved_run(rank, size, store, "tiny", overrides)))
    return str(error.value)


def test_a_model_that_cannot_be_written_on_the_way_is_told(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "exports").write_text("in the way")
    options = [*RUN[1:4], "training.train_iters=2", "training.export_interval=1"]
    options += ["training.eval_data_path=null"]
    run(folder, 1, "tiny", options)
    log = (folder / "logs" / "rank_0000.log").read_text()
    told = "the model of step 1 could not be written: File exists"
    assert f"{told}; training goes on" in log and (folder / "model").is_dir()
    folder = tmp_path / "strict"
    folder.mkdir()
    (folder / "exports").write_text("in the way")
    strict = [*options, "training.on_save_failure=stop", f"output_dir={folder}"]
    assert run_ranks(blocked, 1, strict) == [told]


def unknown(rank: int, size: int, store: object, overrides: list[str]) -> str:
    with pytest.raises(BadInput) as error:
        train(prepare(*resolved_run(rank, size, store, "tiny", overrides)))
    return str(error.value)


def test_a_score_that_no_evaluation_gives_is_told_before_the_first_step(
    tiny: Path, few: list[str], tmp_path: Path
) -> None:
    options = [*RUN, *few, "training.stop_at={reward/ac/right: 0.5}", f"output_dir={tmp_path}/run"]
    told = run_ranks(unknown, 2, [*options, "resource_pool.colocate=true"])
    assert len(set(told)) == 1
    assert told[0].startswith("training.stop_at: reward/ac/right is no score of the evaluation")
    assert "did you mean reward/acc/right?" in told[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
