"""Tiny random reward models as Hugging Face folders, and their values by transformers and plain
PyTorch, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.models import FAMILIES, file_tensors, fill_at_random
from transformers import AutoModel, AutoModelForSequenceClassification

from r1zero.policy.reward_model import Text

EOS = 2
STEP = 500  # the step token of process reward models here


def make_classifier(family: str, folder: Path, **sizes: object) -> torch.nn.Module:
    """A reward model with one linear layer, whose padding is its end of text; returned in fp32, to be
    asked for one text at a time."""
    config = FAMILIES[family](pad_token_id=EOS, **sizes).config
    config.num_labels = 1
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config).float().eval()
    fill_at_random(model)
    model.save_pretrained(folder)
    model.config._experts_implementation = "eager"  # grouped products are less exact
    # else it would look for the last token that is no padding, and leave an end of text out
    model.config.pad_token_id = None
    return model


class TwoLayers(torch.nn.Module):
    """Qwen2ForRewardModel and Qwen2ForProcessRewardModel, which transformers does not have."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        config = FAMILIES["qwen2"](pad_token_id=EOS).config
        hidden = config.hidden_size
        self.model = AutoModel.from_config(config)
        self.score = torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(ids).last_hidden_state)


def make_two_layers(folder: Path, outputs: int) -> TwoLayers:
    """A reward model with two linear layers: of a process reward model with two outputs."""
    torch.manual_seed(7)
    model = TwoLayers(outputs).float().eval()
    fill_at_random(model)
    folder.mkdir(parents=True, exist_ok=True)
    named = "Qwen2ForRewardModel" if outputs == 1 else "Qwen2ForProcessRewardModel"
    config = model.model.config.to_dict() | {"architectures": [named], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    if outputs > 1:
        tokens = {"added_tokens": [{"id": STEP, "content": "<extra_0>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(file_tensors(tensors), folder / "model.safetensors", {"format": "pt"})
    return model


def make_texts(steps: bool = False) -> list[Text]:
    """Four responses to each of three prompts, every other one with an end of text; with `steps` some
    of their tokens end a step."""
    random = np.random.default_rng(0)
    texts = []
    for length in (11, 1, 30):
        prompt = random.integers(3, STEP, length, dtype=np.int32)
        for member in range(4):
            response = random.integers(3, STEP, random.integers(2, 25), dtype=np.int32)
            marks: list[int] = []
            if steps:
                marks = list(range(1, len(response), 3))
                response[marks] = STEP
            if member % 2 == 0:
                response[-1] = EOS
            texts.append(Text(prompt, response, marks))
    return texts


@torch.no_grad()
def plain_values(model: torch.nn.Module, texts: list[Text]) -> list[float]:
    """The value at the last token of each text."""
    found = []
    for text in texts:
        if isinstance(model, TwoLayers):
            found.append(model(_ids(text))[0, -1, 0].item())
        else:
            found.append(model(_ids(text)).logits[0, 0].item())
    return found


@torch.no_grad()
def plain_probabilities(model: torch.nn.Module, texts: list[Text]) -> list[list[float]]:
    """The probability that each step of each text is right."""
    found = []
    for text in texts:
        logits = model(_ids(text))[0, len(text.prompt) :]
        found.append([logits[mark].softmax(-1)[1].item() for mark in text.marks])
    return found


def _ids(text: Text) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([text.prompt, text.response]).astype(np.int64))[None]
