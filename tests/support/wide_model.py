"""The tiny model with heads of 32 columns, which vLLM's attention on CPUs takes: the same function.

Half the columns of a head, and half those of the hidden state, are zeros that stay zeros. Rotary
pair j of a head of 16 turns as fast as pair 2 j of a head of 32, so that is where it goes.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEAD = 16  # of the tiny model


def widen(tiny: Path, folder: Path) -> Path:
    """Write the model in `tiny` with heads and hidden states of twice the columns to `folder`."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tiny / "config.json").read_text())
    assert config["hidden_size"] == HEAD * config["num_attention_heads"]
    config["hidden_size"] *= 2
    config["rms_norm_eps"] /= 2  # beside a mean of squares that is half as large
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny / "model.safetensors")
    wide = {name: _wide(name, tensor) for name, tensor in tensors.items()}
    save_file(wide, folder / "model.safetensors", {"format": "pt"})
    return folder


def _wide(name: str, tensor: torch.Tensor) -> torch.Tensor:
    module, kind = name.split(".")[-2:]
    if "norm" in module:
        return torch.cat([tensor, tensor]) / math.sqrt(2)
    if module == "q_proj":  # scores are divided by the root of a larger head
        tensor = _turned(tensor) * math.sqrt(2)
    elif module == "k_proj":
        tensor = _turned(tensor)
    elif module == "v_proj":
        tensor = _padded_heads(tensor)
    elif module == "o_proj":
        tensor = _padded_heads(tensor.T).T
    if kind == "bias":
        return tensor.contiguous()
    if module in ("o_proj", "down_proj"):  # rows make hidden states, columns take them elsewhere
        return torch.cat([tensor, torch.zeros_like(tensor)])
    return torch.cat([tensor, torch.zeros_like(tensor)], dim=1)


def _padded_heads(rows: torch.Tensor) -> torch.Tensor:
    """Rows [heads * 16, ...] with as many rows of zeros behind those of each head."""
    heads = rows.unflatten(0, (-1, HEAD))
    return torch.cat([heads, torch.zeros_like(heads)], dim=1).flatten(0, 1)


def _turned(rows: torch.Tensor) -> torch.Tensor:
    """Rows [heads * 16, ...], each followed by a row of zeros."""
    return torch.stack([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
