"""Variants of the tiny model's folder, as model folders come: padded, a base model's, of another
family's marks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKENS = 271  # of the tiny model, in 320 rows
EMBEDDING = "model.embed_tokens.weight"


def variant(tiny: Path, folder: Path, **edits: Callable[[dict[str, Any]], object]) -> Path:
    """Copy the model into `folder` and edit JSON files by their stems."""
    shutil.copytree(tiny / "model", folder)
    for stem, edit in edits.items():
        path = folder / f"{stem}.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
    return folder


def write_rows(folder: Path, rows: torch.Tensor) -> None:
    """Replace the embedding, which is the output layer, too."""
    weights = load_file(folder / "model.safetensors") | {EMBEDDING: rows}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def read_rows(folder: Path) -> torch.Tensor:
    """The embedding [rows, hidden]."""
    return load_file(folder / "model.safetensors")[EMBEDDING]


def padded(tiny: Path, folder: Path, rows: int) -> Path:
    """Append rows that nothing has trained, larger than all others."""
    variant(tiny, folder, config=lambda config: config.update(vocab_size=rows))
    known = read_rows(folder)[:TOKENS]
    torch.manual_seed(0)
    write_rows(
        folder, torch.cat([known, torch.randn(rows - TOKENS, known.shape[1]) * 5 * known.std()])
    )
    return folder


def holed(tiny: Path, folder: Path, first: int, gap: int) -> Path:
    """Move the tokens from `first` on by `gap` ids, and leave untrained rows in between."""

    def move(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        # or ids would close up
        vocab.update({token["content"]: token["id"] for token in content["added_tokens"]})
        for text, number in vocab.items():
            vocab[text] = number + gap * (number >= first)
        for token in content["added_tokens"]:
            token["id"] = vocab[token["content"]]

    variant(tiny, folder, tokenizer=move)
    known = read_rows(folder)[:TOKENS]
    torch.manual_seed(0)
    moved = torch.randn(320, known.shape[1]) * 5 * known.std()
    moved[:first], moved[first + gap : TOKENS + gap] = known[:first], known[first:]
    write_rows(folder, moved)
    return folder


def base(tiny: Path, folder: Path) -> Path:
    """End texts as Qwen2.5's base models do: <|endoftext|> only, in all three files."""
    return variant(
        tiny,
        folder,
        config=lambda config: config.update(eos_token_id=0),
        generation_config=lambda config: config.update(eos_token_id=0),
        tokenizer_config=lambda config: config.update(eos_token="<|endoftext|>"),
    )


def llama_like(tiny: Path, folder: Path) -> Path:
    """Mark turns as Llama 3 does."""
    shutil.copytree(tiny / "model", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        text = text.replace("<|im_start|>", "<|start_header_id|>").replace(
            "<|im_end|>", "<|eot_id|>"
        )
        (folder / name).write_text(text)
    return folder


def keep_digits_together(content: dict[str, Any]) -> None:
    """Make tokens of 12 and 123, and cut digits into threes, in the content of a tokenizer.json."""
    vocab = content["model"]["vocab"]
    first = len(vocab)
    vocab.update({"12": first, "123": first + 1})
    content["model"]["merges"] = [["1", "2"], ["12", "3"]]
    for token in content["added_tokens"]:
        token["id"] += 2 * (token["id"] >= first)
    split = {
        "type": "Split",
        "pattern": {"Regex": "\\p{N}{1,3}"},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
