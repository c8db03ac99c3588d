"""Safetensors headers: which tensors a Hugging Face folder holds, and whether they are the model's.

Layout of a file: 8 bytes header length, little endian; the header, JSON; the data. Only the header
is read here, so even a large model is compared in a moment, before any process starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from r1zero.config.parse import read_json
from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.hf_config import fp8_block
from r1zero.models.params import param_table
from r1zero.weights import fp8
from r1zero.weights.detect import CONFIG, INDEX, SINGLE

FLOATS = ("BF16", "F16", "F32", "F64")  # safetensors' names
HEAD = "lm_head.weight"
POINTER = b"version https://git-lfs"  # what stands in a file that Git LFS has not fetched
_MOST_SHOWN = 10  # problems in a sentence


class StoredTensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder consists of. BadInput when it does not say."""
    single = folder / SINGLE
    if single.is_symlink() and not single.exists():
        raise BadInput(f"{single} is a link to {single.readlink()}, which is not there")
    if single.is_file() or single.is_dir():
        return [single]
    index = folder / INDEX
    if not index.is_file():
        raise BadInput(
            f"{folder} holds neither {SINGLE} nor {INDEX}: save the model with safetensors"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{index} is not an index of safetensors files: copy it again") from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read a file's tensors by name, and compare with its size what the header promises.

    BadInput when it is cut off or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == POINTER[:8] and file.read(15) == POINTER[8:]:
                raise BadInput(f"{path} is a pointer of Git LFS, no weights: `git lfs pull`")
            file.seek(8)
            if 8 + length <= size:
                header = json.loads(file.read(length))
            else:
                header = None
        stored = {}
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                stored[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]))
                end = max(end, entry["data_offsets"][1])
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise BadInput(f"{path} is a link to {path.readlink()}, which is not there") from None
        raise BadInput(
            f"{path} cannot be read: {error.strerror}; copy it into the folder, or see to its "
            "permissions"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or not of this form
        raise BadInput(
            f"{path} has no safetensors header: damaged or cut off; copy it again"
        ) from None
    wanted = 8 + length + end
    if size != wanted:
        raise BadInput(
            f"{path} has {size} bytes, but its header describes {wanted}: damaged or cut off; "
            "copy it again"
        )
    return stored


def block_of(folder: Path) -> fp8.Block | None:
    """The blocks of a folder in fp8, by its config.json; None for another. BadInput for other
    quantizations."""
    if not (folder / CONFIG).is_file():
        return None
    return fp8_block(read_json(folder / CONFIG))


def refuse_others(folder: Path, stored: Mapping[str, StoredTensor], shape: ModelConfig) -> None:
    """BadInput listing how the tensors of a folder differ from those that its config.json asks
    for."""
    block = block_of(folder)
    expected: dict[str, tuple[int, ...]] = {}
    table = param_table(shape)
    for tensor in table:
        expected.update(zip(tensor.hf, tensor.hf_shape, strict=True))
    _refuse_prefix(folder, stored, expected)
    optional = {name for tensor in table if tensor.optional for name in tensor.hf}
    problems = [f"{name} is missing" for name in expected if name not in {*stored, *optional}]
    for name, found in stored.items():
        if name in expected:
            problems += _misfit(name, found, expected[name])
            if found.dtype == fp8.FP8:
                problems += fp8.misfits(name, stored, block)
        elif not _is_known(name, stored, shape):
            problems.append(f"{name} is unexpected")
    refuse_misfits(folder, problems)


def _is_known(name: str, stored: Mapping[str, StoredTensor], shape: ModelConfig) -> bool:
    """Whether a tensor may be there beside those of the network."""
    is_spare = name == HEAD and shape.may_have_spare_output_layer
    known = is_spare or name.endswith("rotary_emb.inv_freq") or fp8.is_scale(name, stored)
    return known or _is_further_layer(name, shape)


def _is_further_layer(name: str, shape: ModelConfig) -> bool:
    """Whether a tensor is of a layer behind the last one, which predicts further tokens. The 62nd of
    DeepSeek-V3 is model.layers.61."""
    layers = range(shape.num_layers, shape.num_layers + shape.further_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in layers)


def refuse_misfits(folder: Path, problems: list[str]) -> None:
    """BadInput that lists what does not fit, shortened."""
    if not problems:
        return
    told = "; ".join(problems[:_MOST_SHOWN])
    if len(problems) > _MOST_SHOWN:
        told += f"; and {len(problems) - _MOST_SHOWN} more"
    raise BadInput(f"the weights in {folder} do not fit config.json: {told}")


def _refuse_prefix(folder: Path, names: Iterable[str], expected: Iterable[str]) -> None:
    """BadInput when all tensors have a name in front, as DDP, torch.compile and adapters leave it
    there."""
    wanted = set(expected)
    known = set(names)
    if wanted & known:
        return
    some = min(wanted)
    prefixes = {name.removesuffix(some) for name in known if name.endswith(some)}
    for prefix in sorted(prefixes):
        if all(prefix + name in known for name in wanted):
            raise BadInput(
                f"the tensors in {folder} are named {prefix}...; save the model without "
                f"what wraps it, or take {prefix} off the names"
            )


def _misfit(name: str, found: StoredTensor, expected: tuple[int, ...]) -> list[str]:
    if found.shape != expected:
        return [f"{name} has the shape {found.shape} instead of {expected}"]
    if found.dtype in (*FLOATS, fp8.FP8):
        return []
    return [f"{name} has the type {found.dtype} instead of one of {', '.join(FLOATS)}"]
