"""Tiny reward models as Hugging Face folders: the layers of the tiny model, and a random head.
transformers is the independent reference of what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification, Qwen2Model

SPREAD = 0.3  # of the head's weights


def make_reward_model(tiny: Path, folder: Path, **config: object) -> Path:
    """One linear layer. Its padding token is its end of text, so that who looks for the last token
    that is none finds another than the last."""
    settings = Qwen2Config.from_pretrained(tiny / "model", num_labels=1, **config)
    settings.pad_token_id = settings.eos_token_id
    model = Qwen2ForSequenceClassification.from_pretrained(
        tiny / "model", config=settings, dtype=torch.float32
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=SPREAD)
    model.save_pretrained(folder)
    _copy_tokenizer(tiny, folder)
    return folder


def make_process_reward_model(tiny: Path, folder: Path, mark: str) -> Path:
    """Two layers and two outputs, on the layers of the tiny model, for steps that end with `mark`."""
    folder.mkdir()
    _copy_tokenizer(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    tokenizer.save_pretrained(folder)
    config = json.loads((tiny / "model" / "config.json").read_text())
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    (folder / "config.json").write_text(json.dumps(config))
    hidden = config["hidden_size"]
    torch.manual_seed(2)
    weights = load_file(tiny / "model" / "model.safetensors")
    weights |= {
        "score.0.weight": torch.randn(hidden, hidden) * SPREAD,
        "score.0.bias": torch.randn(hidden),
        "score.2.weight": torch.randn(2, hidden) * SPREAD,
        "score.2.bias": torch.randn(2),
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def values_of(folder: Path, texts: list[str]) -> list[float]:
    """What transformers says of whole texts, at their last token."""
    model = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        hidden = model.model(ids).last_hidden_state
        found.append(float(model.score(hidden)[0, -1, 0]))
    return found


@torch.no_grad()
def step_values_of(folder: Path, text: str, mark: str) -> list[float]:
    """What the layers of transformers and the head say at every mark of a text: the probability that
    the step before it is right."""
    weights = load_file(folder / "model.safetensors")
    layers = Qwen2Model.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    hidden = layers(ids).last_hidden_state[0]
    inner = hidden @ weights["score.0.weight"].T + weights["score.0.bias"]
    outputs = inner.relu() @ weights["score.2.weight"].T + weights["score.2.bias"]
    places = ids[0] == tokenizer.convert_tokens_to_ids(mark)
    return outputs.softmax(-1)[places, 1].tolist()


def _copy_tokenizer(tiny: Path, folder: Path) -> None:
    for path in (tiny / "model").glob("*token*"):
        shutil.copy(path, folder)
