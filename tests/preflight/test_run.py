"""The resolved run: complete, frozen, and made by looking at each thing once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.multiproc import run_ranks
from support.worlds import resolved_run

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.dtype import Dtype
from r1zero.preflight.found import look
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import Run, resolve
from r1zero.trainer import prepare


def run_of(*overrides: str) -> Run:
    cfg, warnings = load_config("tiny", list(overrides))
    return resolve(cfg, warnings)


def test_a_run_says_what_its_configuration_means_here(tiny: Path, tmp_path: Path) -> None:
    run = run_of(f"output_dir={tmp_path / 'run'}", "training.bf16=true", "resource_pool.ref=[1]")
    assert run.placement.world_size == 4 and len(run.node_of_rank) == 4
    assert Path(run.actor.load) == Path(run.reference.load) == run.actor.folder
    assert run.actor.shape == ModelConfig.from_folder(run.actor.folder)
    assert (run.dtype, run.dtype.itemsize, run.dtype.full_name) == (Dtype.BF16, 2, "bfloat16")
    assert run.checkpoints == tmp_path / "run" / "checkpoints"
    [held_out] = run.eval_data
    assert held_out.held_out and held_out.name == ""
    assert run.engine_config.max_response == run.config.response_budget
    assert run.total_updates == run.config.training.train_iters * run.config.updates_per_step
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.dtype = Dtype.FP32  # type: ignore[misc]
    assert run_of(f"output_dir={tmp_path}/2", "training.eval_data_path=null").eval_data == ()


def test_resolving_tells_everything_that_is_wrong_at_once(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        run_of("actor_rollout.load=/nowhere", "algorithm.loss=grpoo", f"output_dir={tmp_path}/run")
    said = str(error.value)
    assert "actor_rollout.load: /nowhere does not exist" in said
    assert "algorithm.loss: grpoo" in said


def test_what_is_elsewhere_is_looked_at_as_far_as_it_goes(tmp_path: Path) -> None:
    cfg, _ = load_config("qwen25_7b", ["actor_rollout.load=/nowhere/Qwen2.5-7B"])
    found = look(cfg)
    assert found.placement is not None and found.placement.world_size == 16
    assert found.actor.shape is not None, "the model file stands in for the folder"
    assert found.actor.shape == found.reference.shape
    assert look(cfg, 15).placement is None
    [sentence] = look(cfg, 15).misplaced
    assert "the world has 15 ranks" in sentence


def reads(rank: int, size: int, store: object, overrides: list[str]) -> list[str]:
    """The folders whose config.json a start reads as a network, until training would begin."""
    found = []
    read = ModelConfig.from_folder.__func__

    def counted(cls: type[ModelConfig], folder: str | Path) -> ModelConfig:
        found.append(str(folder))
        return read(cls, folder)

    ModelConfig.from_folder = classmethod(counted)
    prepare(*resolved_run(rank, size, store, "tiny", overrides)).close()
    return found


def test_each_config_json_is_read_once_a_start(tiny: Path, tmp_path: Path) -> None:
    overrides = ["training.eval_data_path=null", f"output_dir={tmp_path / 'run'}"]
    assert run_ranks(reads, 1, overrides) == [[str(tiny / "model")]]
