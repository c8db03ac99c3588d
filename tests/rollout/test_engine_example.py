"""examples/engine_transformers.py: an engine from outside draws what the native one does.

Its weights are those that publishing wrote into Hugging Face's tensors.
"""

from __future__ import annotations

import math
import runpy
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import make_model
from support.multiproc import run_ranks
from support.worlds import make_runtime
from transformers import AutoModelForCausalLM

from r1zero.distributed.placement import RankGrid
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.params import FIRST, WHOLE, ParamSpec, Shards, local_view, param_table
from r1zero.rollout.engines import ENGINES, choose_engine, engine_problems
from r1zero.runtime import Runtime
from r1zero.step import train_step
from r1zero.types import Batch, Group
from r1zero.weight_sync.plan import plan
from r1zero.weights.open import open_weights

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "engine_transformers.py"
OWN = f"actor_rollout.engine={EXAMPLE}:TransformersEngine"
STEPS = 2


def kept_samples(runtime: Runtime) -> list[Group]:
    """The groups that the output rank of a rollout replica logs from now on."""
    found: list[Group] = []
    add = runtime.sample_log.add

    def keep(batch: Batch, groups: list[Group]) -> None:
        found.extend(groups)
        add(batch, groups)

    if runtime.world.rollout.is_output_rank:
        runtime.sample_log.add = keep
    return found


def samples_body(
    rank: int, size: int, store: object, folder: str, overrides: list[str]
) -> list[list[tuple]]:
    """Tokens, log-probs, truncation and version of all samples of two steps, on the controller."""
    runtime = make_runtime(store, f"{folder}/run", *overrides, rank=rank, size=size)
    logged = kept_samples(runtime)
    found = []
    try:
        runtime.start()
        for step in range(1, STEPS + 1):
            outcome = train_step(step, runtime)
            runtime.progress.advance(runtime.drawn)
            shares = runtime.move.to_controller(list(logged))
            logged.clear()
            if outcome is None:
                continue
            assert outcome.broken == []
            groups = sorted(chain.from_iterable(shares), key=lambda group: group.position)
            drawn = [sample for group in groups for sample in group.samples]
            found.append([(s.tokens, s.logprobs, s.truncated, s.version) for s in drawn])
    finally:
        runtime.close()
    return found


@pytest.fixture(scope="module")
def native(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple]]:
    folder = tmp_path_factory.mktemp("native")
    return run_ranks(samples_body, 4, str(folder), [])[0]


@pytest.mark.parametrize("rollout_tp", [1, 2])
def test_it_draws_the_same_samples_in_a_run(
    native: list[list[tuple]], tmp_path: Path, rollout_tp: int
) -> None:
    """Two replicas of one rank, or one of two ranks which both hold the whole model."""
    overrides = [OWN, f"actor_rollout.infer_tensor_parallel_size={rollout_tp}"]
    own = run_ranks(samples_body, 4, str(tmp_path), overrides)[0]
    assert len(own) == len(native) == STEPS
    for ours, theirs in zip(native, own, strict=True):
        assert len(ours) == len(theirs) == 128
        for (tokens, logprobs, *rest), (own_tokens, own_logprobs, *own_rest) in zip(
            ours, theirs, strict=True
        ):
            assert tokens.tolist() == own_tokens.tolist()
            np.testing.assert_allclose(own_logprobs, logprobs, rtol=0, atol=1e-4)
            assert rest == own_rest


# -- Hugging Face's tensors as a weight target -----------------------------------------------------


def whole_model(
    folder: Path, family: str, **sizes: int
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    make_model(family, folder, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ModelConfig.from_folder(folder), dict(model.named_parameters())


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen3", "llama", "olmo2"])
def test_megatron_parameters_are_written_to_their_places(tmp_path: Path, family: str) -> None:
    """What the loader reads in Megatron's layout arrives as transformers loads it."""
    shape, expected = whole_model(tmp_path, family)
    tensors = {name: torch.full_like(value, -1.0) for name, value in expected.items()}
    target = WeightTarget(WeightLayout("hf", cut=False), tensors, lambda version: None)
    stream = open_weights(tmp_path, shape).stream(param_table(shape), FIRST, WHOLE, torch.float32)
    for spec, param in stream:
        target.write(spec, param, WHOLE)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_experts_are_written_into_the_model_of_transformers(tmp_path: Path) -> None:
    """Its tensors hold all experts of a layer, where files and the target have one for each."""
    make_model("qwen3_moe", tmp_path)
    shape = ModelConfig.from_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.data.fill_(-1.0)
    tensors = runpy.run_path(str(EXAMPLE))["file_tensors"](model)
    target = WeightTarget(WeightLayout("hf", cut=False), tensors, lambda version: None)
    table = param_table(shape)
    assert target.problems(table, WHOLE) == []
    for spec, param in open_weights(tmp_path, shape).stream(table, FIRST, WHOLE, torch.float32):
        target.write(spec, param, WHOLE)
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("elements", [1, 37, 500, 10**6])
def test_boxes_that_cross_tensors_are_cut_there(tmp_path: Path, tp: int, elements: int) -> None:
    """Buckets of any size fill a TP rank's part of each tensor, each element once."""
    sizes = dict(num_hidden_layers=1, vocab_size=32) if elements == 1 else {}
    shape, whole = whole_model(tmp_path, "qwen3", **sizes)
    table = param_table(shape)
    train = RankGrid.of("train", 0, 1)
    rollout = RankGrid.of("rollout", 1, tp, tp)
    laid = plan(table, shape.num_layers, train, rollout, 4, 4 * elements)
    stream = open_weights(tmp_path, shape).stream(table, FIRST, WHOLE, torch.float32)
    full = {spec.name: param for spec, param in stream}
    layout = WeightLayout("hf", cut=True)
    parts = [parts_of(table, whole, index, tp) for index in range(tp)]
    targets = [
        {name: torch.full_like(part, math.nan) for name, part in expected.items()}
        for expected in parts
    ]
    for bucket in laid.buckets():
        for receiver, piece in product(bucket.receivers, bucket.pieces):
            spec = table[piece.tensor]
            values = local_view(spec, full[spec.name], WHOLE)[piece.source]
            target = WeightTarget(layout, targets[receiver - 1], lambda version: None)
            for index, place in target.regions(spec, piece.target, Shards(tp)):
                assert place.shape == values[index].shape
                assert place.isnan().all(), "no element arrives twice"
                place.copy_(values[index])
    for expected, found in zip(parts, targets, strict=True):
        for name, part in expected.items():
            assert torch.equal(found[name], part), name


def parts_of(
    table: list[ParamSpec], whole: dict[str, torch.Tensor], index: int, tp: int
) -> dict[str, torch.Tensor]:
    """What a TP rank holds of each tensor: columns of what takes a cut input, else rows."""
    found = {}
    for spec in table:
        for name in spec.hf:
            by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            if spec.axis is None:
                found[name] = whole[name]
            else:
                found[name] = whole[name].chunk(tp, dim=int(by_columns))[index].clone()
    return found


def test_an_engine_without_a_place_for_a_parameter_is_told(tmp_path: Path) -> None:
    shape, whole = whole_model(tmp_path, "llama")
    table = param_table(shape)

    def problems(tensors: dict[str, torch.Tensor], tp: int = 1) -> list[str]:
        layout = WeightLayout("hf", cut=True)
        return WeightTarget(layout, tensors, lambda version: None).problems(table, Shards(tp))

    assert problems(whole) == []
    assert problems(parts_of(table, whole, 1, 2), tp=2) == []
    name = "model.layers.1.self_attn.k_proj.weight"
    assert problems({key: value for key, value in whole.items() if key != name}) == [
        f"{name} is missing"
    ]
    gate = "model.layers.0.mlp.gate_proj.weight"
    [problem] = problems(whole | {gate: whole[gate][1:]})
    assert problem.startswith(f"{gate} and model.layers.0.mlp.up_proj.weight: ")
    with pytest.raises(BadInput, match="as megatron or hf, not huggingface"):
        WeightLayout("huggingface", cut=True)  # type: ignore[arg-type]


# -- the table -------------------------------------------------------------------------------------


def test_the_layout_says_over_which_ranks_tensors_are_cut() -> None:
    rollout = RankGrid.of("rollout", 3, 4, tp=2)
    assert WeightLayout("megatron", cut=True).grid(rollout) == rollout
    whole = WeightLayout("hf", cut=False).grid(rollout)
    assert (whole.ranks, whole.tp, whole.dp) == ([3, 4, 5, 6], 1, 4)


def test_engines_are_found_by_name_or_place(tmp_path: Path) -> None:
    assert engine_problems("native") == []
    assert engine_problems(OWN.partition("=")[2]) == []
    assert choose_engine("native").layout == WeightLayout("megatron", cut=True)
    assert choose_engine("vllm").layout == WeightLayout("hf", cut=True)
    assert list(ENGINES) == ["native", "vllm"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nativ", "nativ is not one of native, vllm; did you mean native?"),
        ("sglang", "sglang is not one of native, vllm; your own is module:class or path.py:class"),
        ("absent.py:Engine", "there is no file absent.py"),
        (f"{EXAMPLE}:Engine", "has no Engine"),
        ("r1zero.types:Sample", "r1zero.types:Sample is no rollout engine: it needs a `layout`"),
        ("r1zero.step:train_step", "train_step in r1zero.step is no class"),
    ],
)
def test_what_is_no_engine_is_told_before_a_start(name: str, said: str) -> None:
    [problem] = engine_problems(name)
    assert problem.startswith("actor_rollout.engine: ") and said in problem
    with pytest.raises(BadInput):
        choose_engine(name)
