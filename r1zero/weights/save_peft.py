"""Write adapters as a PEFT folder: adapter_config.json and adapter_model.safetensors.

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)

PEFT has an adapter for each of Hugging Face's layers. Of a fused layer they share A, which is
written with each; B is taken apart as the fused weight is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.lora import (
    PEFT_A,
    PEFT_B,
    PEFT_PREFIX,
    AdapterSpec,
    LoraConfig,
    adapter_table,
)
from r1zero.models.params import ParamSpec
from r1zero.run_folder.durable import sync, sync_folder
from r1zero.weights.save_huggingface import split

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"


def save_peft(
    folder: Path,
    shape: ModelConfig,
    lora: LoraConfig,
    stream: Iterable[tuple[ParamSpec, torch.Tensor]],
    base: str | Path,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Write a PEFT folder from whole A and B in Megatron's layout for TP 1, in any order.

    `base` names the model that the adapters belong to, `beside` has more files, text by name. The
    folder appears complete and synced, in place of an older one, or not at all. BadInput if
    something else lies there; OSError when it cannot be written.
    """
    if folder.exists() and not _replaceable(folder):
        raise BadInput(f"{folder} is in the way of the adapters, which are a folder; move it")
    table = adapter_table(shape, lora)
    whole = {spec.name: tensor for spec, tensor in stream}
    tensors: dict[str, torch.Tensor] = {}
    for spec in table:
        tensors |= peft_tensors(spec, whole[spec.a.name], whole[spec.b.name])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / PEFT_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        texts = {PEFT_CONFIG: _config(table, lora, base), **(beside or {})}
        for name, text in texts.items():
            (partial / name).write_text(text)
        for path in partial.iterdir():
            sync(path)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def peft_tensors(spec: AdapterSpec, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one adapter by PEFT's names: A and B of each Hugging Face layer."""
    tensors = {}
    for module in spec.hf_modules:
        tensors[f"{PEFT_PREFIX}{module}.{PEFT_A}"] = a.clone()  # files share no memory
    for name, part in split(spec.b, b):
        assert name.endswith(PEFT_B), name
        tensors[name] = part.contiguous()
    return tensors


def _config(table: list[AdapterSpec], lora: LoraConfig, base: str | Path) -> str:
    """The text of adapter_config.json."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(set(_layer_names(table))),
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def _layer_names(table: list[AdapterSpec]) -> Iterator[str]:
    """The last part of each layer's name, such as q_proj."""
    for spec in table:
        for module in spec.hf_modules:
            yield module.rpartition(".")[2]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give the complete folder its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / PEFT_CONFIG).is_file() or not any(folder.iterdir()))
