"""tools/make_tiny_reward.py: a folder that transformers reads, made the same each time, of a model that has
learnt what most right answers look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tool import functions, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForSequenceClassification

TOOL = "make_tiny_reward.py"
STEPS = "25"
GOOD = "<think>2+3=5, 1+2+0=3</think><answer>\\boxed{35}</answer><|im_end|>"
POOR = "I guess: \\boxed{71}<|im_end|>"


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that learned for a moment."""
    made = tmp_path_factory.mktemp("reward") / "made" / "here"
    assert (
        run_here(TOOL, "--base", str(tiny / "model"), "--output", str(made), "--steps", STEPS) == 0
    )
    return made


def test_the_folder_is_one_of_transformers(folder: Path, tiny: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert len(config["id2label"]) == 1, "how transformers writes num_labels 1"
    assert not list(folder.parent.glob("*unfinished*"))
    tensors = load_file(folder / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny / "model").state_dict()
    assert set(tensors) == set(base) - {"lm_head.weight"} | {"score.weight"}
    assert tensors["score.weight"].shape == (1, config["hidden_size"])
    assert {each.dtype for each in tensors.values()} == {torch.float32}
    text = "What is 12+23?" + GOOD
    ours = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ours == AutoTokenizer.from_pretrained(tiny / "model")(text)["input_ids"]


def test_transformers_reads_the_value_at_the_last_token(folder: Path) -> None:
    """What the tool learns by is what the model's own class says, padded or not."""
    model = Qwen2ForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "What is 12+23?"
    values = functions(TOOL)["values"]
    with torch.no_grad():
        together = values(model, tokenizer, [(prompt, GOOD), (prompt, POOR)])
        for value, response in zip(together, (GOOD, POOR), strict=True):
            alone = tokenizer(prompt + response, return_tensors="pt")
            hidden = model.model(**alone).last_hidden_state[0, -1]
            assert float(value) == pytest.approx(float(model.score(hidden)), abs=1e-5)
    assert together[0] > together[1] + 0.1, "it learned something in these steps"


def test_the_seed_decides_and_what_is_there_is_left_alone(
    folder: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(seed: str, *more: str) -> bytes:
        out = str(tmp_path / "out")
        base = str(tiny / "model")
        arguments = ["--base", base, "--output", out, "--steps", "2", "--seed", seed, *more]
        assert run_here(TOOL, *arguments) == 0
        return (tmp_path / "out" / "model.safetensors").read_bytes()

    first = made("1")
    assert "of 512 held-out pairs" in capsys.readouterr().out
    assert made("2") == first and "--force makes it again" in capsys.readouterr().out
    assert made("2", "--force") != first
    assert made("1", "--force") == first


def test_without_a_model_to_start_from_it_says_what_makes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_here(TOOL, "--base", str(tmp_path), "--output", str(tmp_path / "out"))
    assert code == 2 and "python tools/make_tiny.py makes it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
