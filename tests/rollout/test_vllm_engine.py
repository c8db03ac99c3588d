"""vLLM as an engine, on a stand-in for it (support/vllm_standin.py): samples, weights, traps.

test_vllm_cpu.py has the real one.
"""

from __future__ import annotations

import importlib.util
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import vllm_standin
from support.multiproc import run_ranks
from support.vllm_runs import (
    agree,
    drawn,
    engine_of,
    engine_setup,
    fill,
    same_runs,
    train_body,
)
from support.wide_model import widen
from support.worlds import SHORT, make_world
from torch.distributed import distributed_c10d as c10d

from r1zero.distributed.groups import Grid
from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.config import Experts, ModelConfig
from r1zero.rollout.engines import choose_engine, engine_problems
from r1zero.rollout.vllm.refusals import refusal


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widen(tiny / "model", tmp_path_factory.mktemp("wide") / "model")


# -- samples ---------------------------------------------------------------------------------------


def standin_train_body(rank, size, store, overrides):
    vllm_standin.install()
    return train_body(rank, size, store, overrides)


def test_a_run_learns_the_same(wide: Path, tmp_path: Path) -> None:
    """Two steps, one replica of TP 2: chunks of prompts, rows that start over."""
    same_runs(standin_train_body, wide, tmp_path, 2, SHORT)


# -- weights and traps -----------------------------------------------------------------------------


def weights_body(rank, size, store, wide, breakage):
    """Draw with two versions of the weights; log-probs of both, by both engines."""
    vllm_standin.install()
    world = make_world(rank, size, store, (1, 1), rollout=size)
    if breakage == "cache":
        vllm_standin.LLMEngine.reset_prefix_cache = lambda self: True
    elif breakage == "refuses":
        vllm_standin.LLMEngine.reset_prefix_cache = lambda self: False
    elif breakage == "packed head":
        pack_the_head()
    elif breakage == "ranks":
        draw_otherwise_on(1, rank)
    found = []
    ours, native = (engine_of(name, wide, world) for name in ("vllm", "native"))
    for version in range(2):
        for engine in (ours, native):
            fill(engine, wide, world, version)
        found.append((drawn(ours, version), drawn(native, version)))
    return found


def pack_the_head():
    """Have a vLLM whose head is laid out elsewhere by another function than ours stands in for."""
    pack = vllm_standin.dispatch_cpu_unquantized_gemm

    def lay_out(self, remove_weight):
        if remove_weight:
            self.cpu_linear = torch.nn.functional.linear
        else:
            pack(self, remove_weight)

    vllm_standin.Linear.lay_out = lay_out


def draw_otherwise_on(broken, rank):
    """Have ranks of a replica that do not get the same bits."""
    forward = vllm_standin.Model.forward
    if rank == broken:
        vllm_standin.Model.forward = lambda self, tokens: forward(self, tokens).flip(0)


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_are_written_in_place(wide: Path, tp: int) -> None:
    """Samples and log-probs are those of the native engine, after a second publication, too."""
    for versions in run_ranks(weights_body, tp, wide, None):
        for ours, native in versions:
            assert agree(ours, native)
        assert not agree(versions[0][0], versions[1][0]), "other weights draw otherwise"


@pytest.mark.parametrize("breakage", ["cache", "packed head"])
def test_what_old_weights_computed_is_seen(wide: Path, breakage: str) -> None:
    """These tests would notice a prefix cache that is kept, and a tied head that is not updated."""
    [versions] = run_ranks(weights_body, 1, wide, breakage)
    assert not agree(*versions[1])


@pytest.mark.parametrize(
    ("tp", "breakage", "said"),
    [(1, "refuses", "did not empty its prefix cache"), (2, "ranks", "drew different tokens")],
)
def test_what_must_not_go_on_ends_the_run(wide: Path, tp: int, breakage: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        run_ranks(weights_body, tp, wide, breakage)


def test_a_vllm_that_lays_weights_out_by_another_name_does_not_start(wide: Path) -> None:
    def body(rank, size, store):
        contents = vllm_standin.MODULES["vllm.model_executor.layers.utils"]
        contents["lay_out_gemm"] = contents.pop("dispatch_cpu_unquantized_gemm")
        vllm_standin.install()
        engine_of("vllm", wide, make_world(rank, size, store, (1, 1)))

    with pytest.raises(AssertionError, match="dispatch_cpu_unquantized_gemm"):
        run_ranks(body, 1)


# -- process groups and shared memory --------------------------------------------------------------


def replicas_body(rank, size, store, wide, word):
    """Build two replicas of TP 2 on one machine, then one more by half the ranks; after that, make a
    group of the whole world."""
    vllm_standin.install()
    if word is not None:
        secrets.token_hex = lambda count: word
        Path.unlink = lambda self, missing_ok: None  # else one might be through before the other
    world = make_world(rank, size, store, (1, 1), rollout=2)
    before = c10d._world.group_count
    default = dist.group.WORLD
    engine_of("vllm", wide, world)
    if world.rollout.replica == 0:
        engine_of("vllm", wide, world)
    assert dist.group.WORLD is default and dist.get_rank() == rank
    assert c10d._world.group_count == before, "torch counts on as on ranks without vLLM"
    everyone = torch.ones(1)
    dist.all_reduce(everyone, group=dist.new_group(list(range(size))))
    return float(everyone)


def shared_memory() -> set[str]:
    return {path.name for path in vllm_standin.SHARED_MEMORY.iterdir()}


def test_replicas_on_one_machine_have_groups_and_memory_of_their_own(wide: Path) -> None:
    before = shared_memory()
    assert run_ranks(replicas_body, 4, wide, None) == [4.0] * 4
    assert not {name for name in shared_memory() - before if "-tp:0-" in name}, "nothing is left"


def test_replicas_of_one_name_would_collide(wide: Path) -> None:
    word = secrets.token_hex(8)
    try:
        with pytest.raises(AssertionError, match="create shm in SHMManager failed. errno: 17"):
            run_ranks(replicas_body, 4, wide, word)
    finally:
        for path in vllm_standin.SHARED_MEMORY.glob(f"{word}*"):
            path.unlink()


# -- what is refused -------------------------------------------------------------------------------


def test_models_that_vllm_does_not_take_are_refused(wide: Path, tiny: Path) -> None:
    shape = ModelConfig.from_folder(wide)
    narrow = ModelConfig.from_folder(tiny / "model")
    odd = replace(shape, vocab_size=330)
    assert refusal(shape, 2, "cpu") is None
    assert refusal(narrow, 1, "npu") is None
    assert refusal(odd, 1, "cpu") is None
    assert "heads of 32, 64" in str(refusal(narrow, 1, "cpu"))
    assert "and this is olmo2" in str(refusal(replace(shape, family="olmo2"), 1, "cpu"))
    assert str(refusal(odd, 2, "cpu")).startswith("actor_rollout.infer_tensor_parallel_size: 2 ")


def test_experts_are_refused_before_vllm_is_imported(wide: Path) -> None:
    """Their routes would not be told, and nothing would replay them."""
    setup = engine_setup("vllm", wide, Grid(RankGrid.of("rollout", 0, 1), True))
    experts = Experts(count=8, top_k=2, ffn_hidden_size=16, layers=(0, 1))
    setup = replace(setup, shape=replace(setup.shape, family="qwen3_moe", experts=experts))
    with pytest.raises(BadInput, match="engine: vllm does not take models with experts"):
        choose_engine("vllm").build(setup)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_one_sentence_says_what_to_do() -> None:
    [problem] = engine_problems("vllm")
    assert problem.startswith("actor_rollout.engine: vllm needs the package vllm, ")
    assert "tools/setup_vllm_env.sh" in problem
    assert choose_engine("vllm").layout.names == "hf", "ranks without an engine need no vLLM"
