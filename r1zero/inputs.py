"""The files a run reads, looked at before it starts: model folders, weights, tokenizer, data and template.

Only headers and first lines are read, so even a large model takes a moment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.config import Config
from r1zero.data.template import Template
from r1zero.model import ModelShape
from r1zero.typed import nearest

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
TINY = "tiny"


def model_shape(cfg: Config, role: str) -> ModelShape | None:
    """Shape of a role's model: from its folder, else from the model file, else None."""
    folder = Path((cfg.ref.load if role == "ref" else cfg.actor_rollout.load) or "")
    if folder.is_dir():
        try:
            return ModelShape.from_folder(folder)
        except ValueError:
            return None  # check_inputs says what is wrong with it
    try:
        return _shape_from_keys(cfg.model_keys(role))
    except KeyError:
        return None


def absent(cfg: Config) -> dict[str, str]:
    """Paths by key, of model folders and data files that are not on this machine."""
    paths = {"actor_rollout.load": cfg.actor_rollout.load, "ref.load": cfg.ref.load,
             "training.tokenizer_name_or_path": cfg.training.tokenizer_name_or_path,
             "actor_rollout.data_path": cfg.actor_rollout.data_path, "training.eval_data_path": cfg.training.eval_data_path}
    return {key: path for key, path in paths.items() if path is not None and not Path(path).exists()}


def check_inputs(cfg: Config, absent_ok: bool = False) -> list[str]:
    """Return a sentence for every file that is missing (unless `absent_ok`), unreadable or of the wrong kind."""
    missing = absent(cfg)
    problems = [] if absent_ok else _missing_sentences(missing)
    loads = {"ref.load": cfg.ref.load, "actor_rollout.load": cfg.actor_rollout.load}
    for folder, key in {path: key for key, path in loads.items() if key not in missing}.items():
        problems += check_folder(key, Path(folder or ""))
    tokenizer = cfg.training.tokenizer_name_or_path
    if "training.tokenizer_name_or_path" not in missing:
        problems += _check_tokenizer(Path(tokenizer or ""))
    data = {"actor_rollout.data_path": cfg.actor_rollout.data_path, "training.eval_data_path": cfg.training.eval_data_path}
    for key, path in data.items():
        if path is not None and key not in missing:
            problems += check_data(key, Path(path), cfg.training.map_keys)
    try:
        Template(cfg.training.prompt_type, cfg.training.prompt_type_path or "")
    except ValueError as error:
        problems.append(f"training.prompt_type: {error}")
    return problems


def _missing_sentences(missing: dict[str, str]) -> list[str]:
    """One sentence a path; a folder that several keys name is missed once."""
    problems = []
    for path, key in {path: key for key, path in reversed(missing.items())}.items():
        kind = "file of prompts" if "data" in key else "Hugging Face model folder"
        if Path(path).parts[-3:-1] == (".cache", TINY):
            way_out = "; make it with `python tools/make_tiny.py`"
        else:
            beside = Path(path).parent
            found = nearest(Path(path).name, [entry.name for entry in beside.iterdir()]) if beside.is_dir() else ""
            way_out = found or "; give its path, relative to the current directory or absolute"
        problems.append(f"{key}: {path} does not exist: it must be a {kind}{way_out}")
    return problems[::-1]


def check_folder(key: str, folder: Path) -> list[str]:
    """A Hugging Face model folder: config.json of a known model and whole safetensors files."""
    if (folder / "latest_checkpointed_iteration.txt").exists():
        return [f"{key}: {folder} is a Megatron checkpoint; give a Hugging Face model folder "
                "(config.json and *.safetensors)"]
    try:
        ModelShape.from_folder(folder)
        shards = _shards(folder)
    except ValueError as error:
        return [f"{key}: {error}"]
    problems = []
    for shard in shards:
        try:
            check_safetensors(shard)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return problems


def _shards(folder: Path) -> list[Path]:
    """The weight files that a model folder consists of."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index} is not an index of safetensors files: copy it again") from None
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json: "
                     "save the model with safetensors")


def check_safetensors(path: Path) -> None:
    """Compare what a file's header promises with its size. ValueError when it is cut off or damaged.

    Layout: 8 bytes header length, little endian; the header, JSON; the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= size else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"] if header else []
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; the index names it, so copy it into the folder") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        header, ends = None, []
    if header is None:
        raise ValueError(f"{path} has no safetensors header: it is damaged or cut off; copy it again")
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise ValueError(f"{path} has {size} bytes, but its header describes {wanted}: it is damaged or cut off; "
                         "copy it again")


def _check_tokenizer(folder: Path) -> list[str]:
    known = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
    if any(all((folder / name).exists() for name in names) for names in known):
        return []
    return [f"training.tokenizer_name_or_path: {folder} has no tokenizer.json: "
            "give a folder that holds a Hugging Face tokenizer"]


def check_data(key: str, path: Path, map_keys: dict[str, str]) -> list[str]:
    """A data file must have rows, and the columns that map_keys names."""
    try:
        columns, rows = _table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"{key}: {path} cannot be read: {str(error).splitlines()[0]}"]
    if not rows:
        return [f"{key}: {path} holds no rows"]
    problems = []
    for part, column in map_keys.items():
        if column and column not in columns:
            problems.append(f"training.map_keys.{part}: {path} has no column {column}{nearest(column, columns)}; "
                            f"it has {', '.join(columns)}")
        elif not column and part in ("prompt", "response"):
            problems.append(f"training.map_keys.{part}: must name a column of {path}; it has {', '.join(columns)}")
    return problems


def _table(path: Path) -> tuple[list[str], int]:
    """Columns and a count of rows (of .jsonl: 1 for any). ValueError for a file that is none."""
    if path.suffix == ".parquet":
        metadata = pq.read_metadata(path)
        return metadata.schema.to_arrow_schema().names, metadata.num_rows
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            line = next((line for line in file if line.strip()), None)
        rows = [] if line is None else [json.loads(line)]
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        raise ValueError(f"the ending {path.suffix!r} is not one of .parquet, .jsonl, .json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows[:1]):
        raise ValueError("it must hold objects, one a problem")
    return list(rows[0]) if rows else [], len(rows)


def _shape_from_keys(keys: dict[str, Any]) -> ModelShape:
    """Read Megatron's names of a model file. KeyError when one is missing."""
    family = "qwen3" if keys.get("qk_layernorm") else "qwen2" if keys.get("add_qkv_bias") else "llama"
    return ModelShape.from_config({
        "architectures": [ARCHITECTURES[family]],
        "num_hidden_layers": keys["num_layers"],
        "hidden_size": keys["hidden_size"],
        "intermediate_size": keys["ffn_hidden_size"],
        "num_attention_heads": keys["num_attention_heads"],
        "num_key_value_heads": keys.get("num_query_groups"),
        "head_dim": keys.get("kv_channels"),
        "vocab_size": keys["padded_vocab_size"],
        "max_position_embeddings": keys["max_position_embeddings"],
        "rope_theta": keys.get("rotary_base", 10000.0),
        "rms_norm_eps": keys.get("norm_epsilon", 1e-6),
        "tie_word_embeddings": not keys.get("untie_embeddings_and_output_weights", False),
    })
