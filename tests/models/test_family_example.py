"""examples/family_seed_oss.py: a family registered from outside computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from support.multiproc import DEVICE, run_ranks
from support.patience import LONG
from support.worlds import metrics, resolved_run
from transformers import SeedOssConfig, SeedOssForCausalLM

from r1zero.algo.packing import TrainSample
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.distributed.placement import RoleSize, place
from r1zero.errors import BadInput
from r1zero.models import family
from r1zero.models.config import ModelConfig
from r1zero.models.params import FIRST, WHOLE, param_table
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs
from r1zero.preflight.resolve import load_config
from r1zero.rollout.decoder import Chunk, Decoder
from r1zero.trainer import prepare, train
from r1zero.types import Prompt, Sample
from r1zero.weights.open import open_weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "family_seed_oss.py"
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=64,
    pad_token_id=None,
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example, imported for one test."""
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    family.register_own("training.model_families", [f"{EXAMPLE}:SeedOss"])
    yield


def make(folder: Path) -> SeedOssForCausalLM:
    torch.manual_seed(3)
    model = SeedOssForCausalLM(SeedOssConfig(**SIZES)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def logprobs_of_both_engines(
    rank: int, size: int, store: object, folder: str, tokens: np.ndarray
) -> tuple:
    """Of the trainer for all but the first token, and the logits of the rollout engine after the
    last."""
    sizes = {role: RoleSize(1) for role in ("train", "rollout", "ref")}
    launch = Launch("single", rank, size, 0, (0,), "", 0)
    world = World(launch, place(sizes, colocate=True), DEVICE, timedelta(seconds=LONG), store)
    config = ModelConfig.from_folder(folder)
    model = RoleModel(
        config, world.train, DEVICE, torch.float32, 64, False, recompute=False, seed=1
    )
    model.load(folder)
    sample = Sample(tokens[1:], np.zeros(len(tokens) - 1, np.float32), False, 0)
    found = compute_logprobs(
        model, model.module, [[TrainSample(0, 0, Prompt(0, "", tokens[:1], ""), sample)]], 1.0
    )
    decoder = Decoder(config, 1, None, torch.float32, torch.device("cpu"), 64)
    for spec, part in open_weights(folder, config).stream(
        param_table(config), FIRST, WHOLE, torch.float32
    ):
        decoder.weights[spec.name].copy_(part)
    decoder.prepare()
    [extended] = decoder.extend([Chunk(tokens)])
    return found[0], extended.logits.numpy()


def test_both_engines_compute_what_transformers_does(example: None, tmp_path: Path) -> None:
    model = make(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 128, 20).astype(np.int32)
    [(trained, drawn)] = run_ranks(logprobs_of_both_engines, 1, str(tmp_path), tokens)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(trained, expected.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(drawn, logits[-1].numpy(), rtol=0, atol=1e-4)


def test_it_is_known_only_when_it_was_registered(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(BadInput, match="architecture 'SeedOssForCausalLM' is not supported"):
        ModelConfig.from_folder(tmp_path)


def test_what_it_does_not_compute_is_refused(example: None) -> None:
    config = SeedOssConfig(**SIZES, attention_out_bias=True).to_dict() | {
        "architectures": ["SeedOssForCausalLM"]
    }
    with pytest.raises(BadInput, match="attention_out_bias: true is not supported; only false is"):
        ModelConfig.from_config(config)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("seed_oss", "names no class; write package.module:class"),
        ("nowhere.py:SeedOss", "there is no file"),
        (f"{EXAMPLE}:SeedOs", "did you mean SeedOss"),
        (f"{EXAMPLE}:NEUTRAL", "is no class"),
        ("r1zero.models.dtype:Dtype", "is no model family"),
        ("r1zero.models.family:ModelFamily", "does not say activation_elements"),
        ("json.nothing:Family", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_is_no_family_is_refused_before_a_start(name: str, sentence: str) -> None:
    with pytest.raises(BadInput) as error:
        load_config("tiny", [f"training.model_families=['{name}']"])
    assert str(error.value).startswith("training.model_families: ")
    assert sentence in str(error.value)


def one_step(rank: int, size: int, store: object, overrides: list[str]) -> str:
    """Train for a step; the family of what was trained."""
    run, world = resolved_run(rank, size, store, "tiny", overrides)
    train(prepare(run, world))
    return run.actor.shape.family


def test_a_run_whose_configuration_names_the_family_trains_it(tiny: Path, tmp_path: Path) -> None:
    rows = ModelConfig.from_folder(tiny / "model").vocab_size
    model = SeedOssForCausalLM(SeedOssConfig(**SIZES | {"vocab_size": rows})).float()
    model.save_pretrained(tmp_path / "model")
    overrides = [
        f"training.model_families=['{EXAMPLE}:SeedOss']",
        f"actor_rollout.load={tmp_path / 'model'}",
        f"training.tokenizer_name_or_path={tiny / 'model'}",
        f"output_dir={tmp_path / 'run'}",
        "training.train_iters=1",
        "training.eval_data_path=null",
        "actor_rollout.lr_warmup_iters=0",
    ]
    assert run_ranks(one_step, 1, overrides) == ["seed_oss"]
    assert len(metrics(tmp_path / "run")) == 1
    exported = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert exported["architectures"] == ["SeedOssForCausalLM"]
