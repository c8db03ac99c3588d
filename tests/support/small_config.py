"""A small complete configuration with its files, shared by the tests of configuration."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from r1zero.config.schema import Config
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}

# 1 train, 2 rollout, 1 ref; every rule holds.
BASE = """
defaults:
  - model: [small]
training: {global_batch_size: 12, seq_length: 96, train_iters: 5}
actor_rollout_ref:
  actor_rollout:
    model: small
    load: LOAD
    data_path: DATA
    n_samples_per_prompt: 4
    ppo_mini_batch_size: 24
    micro_batch_size: 4
    num_samples_per_step: 3
    max_prompt_length: 32
    num_gpus_for_infer: 2
  ref: {micro_batch_size: 2}
algorithm: {verifier_function: [acc, format], verifier_weight: [0.5, 0.5]}
resource_pool: {actor_rollout: [3], ref: [1]}
"""
MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "padded_vocab_size": 128}


def tokenizer_json(*texts: str) -> str:
    """The tokenizer.json of single characters, the marks of ChatML and `texts`: ids 0 to 97 and
    on."""
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *texts])
    return tokenizer.to_str()


def weights() -> dict[str, np.ndarray]:
    """All tensors of the model, by Hugging Face's names."""
    found = {}
    for spec in param_table(ModelConfig.from_config(SHAPE)):
        for name, shape in zip(spec.hf, spec.hf_shape, strict=True):
            found[name] = np.zeros(shape, np.float32)
    return found


def make_home(tmp_path: Path) -> Path:
    """Fill a folder with a model, its model file, data and base.yaml."""
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    save_file(weights(), folder / "model.safetensors")
    pq.write_table(
        pa.table({"question": ["1+1?"], "ground_truth_answer": ["2"]}), tmp_path / "train.parquet"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text(yaml.safe_dump({"small": MODEL}))
    text = BASE.replace("LOAD", str(folder)).replace("DATA", str(tmp_path / "train.parquet"))
    write(tmp_path, "base", text)
    return tmp_path


def write(home: Path, name: str, text: str) -> str:
    path = home / f"{name}.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def load(home: Path, *overrides: str) -> Config:
    return load_config(str(home / "base.yaml"), overrides)[0]


def told(home: Path, *overrides: str) -> list[str]:
    """Everything that is said against base.yaml with these overrides, by reading or by the checks."""
    try:
        return check(load(home, *overrides))
    except BadInput as error:
        return str(error).splitlines()


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]
