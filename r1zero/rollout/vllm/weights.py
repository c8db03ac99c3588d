"""vLLM's fused parameters as Hugging Face's tensors: views, so that what is written to them lies in
vLLM.

A TP rank's part of qkv_proj has the rows of all its queries, of all its keys, of all its values;
gate_up_proj those of the gate, then those of up. A rank's part of the vocabulary is padded at its end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from r1zero.models.config import ModelConfig

VOCABULARY = ("embed_tokens", "lm_head")


def hf_views(
    parameters: Mapping[str, torch.Tensor], shape: ModelConfig, tp: int
) -> dict[str, torch.Tensor]:
    """A rank's parameters, by vLLM's names, as its parts of the tensors that files have."""
    query = shape.num_heads * shape.head_dim // tp  # rows
    key = shape.num_kv_heads * shape.head_dim // tp
    half = shape.ffn_hidden_size // tp
    fused = {
        "qkv_proj": {"q_proj": query, "k_proj": key, "v_proj": key},
        "gate_up_proj": {"gate_proj": half, "up_proj": half},
    }
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        place, _, kind = name.rpartition(".")
        block, _, module = place.rpartition(".")
        if module in fused:
            parts = tensor.split(list(fused[module].values()))
            for part_name, part in zip(fused[module], parts, strict=True):
                found[f"{block}.{part_name}.{kind}"] = part
        elif module in VOCABULARY:
            found[name] = tensor[: shape.vocab_size // tp]
        else:
            found[name] = tensor
    return found
