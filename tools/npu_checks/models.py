"""Models to try things on: the shape of Qwen2.5-0.5B and a small one, with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from r1zero.models.config import ModelConfig
from r1zero.models.params import ParamSpec, param_table

HALF_BILLION: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SMALL = HALF_BILLION | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
# Of logits, which are products with the embedding: some tokens are likely, none is certain.
SHARP = 2.0


def shape(small: bool) -> ModelConfig:
    """The sizes of the model that an item runs."""
    return ModelConfig.from_config(SMALL if small else HALF_BILLION)


def fill(weights: Mapping[str, torch.Tensor]) -> None:
    """Give a decoder weights with which every token depends on those before it; the same on every
    rank that has the same shapes."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "norm" in name:
            weight.fill_(1.0)
            continue
        values = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:  # results of products vary as much as their inputs
            values *= weight.shape[1] ** -0.5
        if "embedding" in name:
            values *= SHARP
        weight.copy_(values)


def write_half_billion(folder: Path, tokenizer: Path) -> Path:
    """A Hugging Face folder of 0.5B random parameters in bf16, with the tokenizer of another
    model."""
    folder.mkdir()
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    ends = json.loads((tokenizer / "config.json").read_text()).get("eos_token_id")
    config = HALF_BILLION | {"dtype": "bfloat16", "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for spec in param_table(ModelConfig.from_config(HALF_BILLION)):
        tensors |= random_tensors(spec, generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_tensors(spec: ParamSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of one parameter, as a model begins: norms 1, others 0.02."""
    found = {}
    for name, size in zip(spec.hf, spec.hf_shape, strict=True):
        if "norm" in name:
            found[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            found[name] = (0.02 * torch.randn(size, generator=generator)).bfloat16()
    return found
