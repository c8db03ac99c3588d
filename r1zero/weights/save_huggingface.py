"""Write a Hugging Face folder: one process all of it, or several of them some files each.

    begin      one process: the hidden folder that the files are written into
    write      each process: some of the files that `plan_files` lists
    complete   one process: the index and what lies beside weights; then the folder gets its name

Each tensor is put at its place in the files as it comes, by the table in models/params.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from r1zero.errors import BadInput
from r1zero.models import hf_config
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    WHOLE,
    ParamSpec,
    local_view,
    param_table,
    single_experts,
    type_of,
)
from r1zero.run_folder.durable import sync
from r1zero.weights.detect import CONFIG, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9  # of a file, unless one tensor is longer
TYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
GENERATION = "generation_config.json"
BESIDE = (
    CONFIG,
    GENERATION,
    "*token*.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    # files of the source folder that belong to the model, tokenizer included
    "*.model",
    "LICENSE*",
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One safetensors file of a model."""

    name: str
    dtype: torch.dtype
    # type, shape and place of each Hugging Face tensor, as the file begins with them
    header: Mapping[str, Any]
    tensors: tuple[ParamSpec, ...]  # those that have a part in it; experts one by one

    @property
    def names(self) -> list[str]:
        """Of the Hugging Face tensors in it."""
        return [name for name in self.header if name != "__metadata__"]

    @property
    def num_bytes(self) -> int:
        """Of the values; the last tensor ends with them."""
        return self.header[self.names[-1]]["data_offsets"][1]


def save_hf(
    folder: str | Path,
    shape: ModelConfig,
    stream: Iterable[tuple[ParamSpec, torch.Tensor]],
    source_folder: str | Path,
    dtype_name: str,
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, str] | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Write a Hugging Face folder from whole tensors in Megatron's layout for TP 1, in any order.

    `dtype_name` is torch's ("bfloat16"). Files are at most `shard_bytes` long, unless one tensor is
    longer; `beside` has more of them, text by name. generation_config.json names `end_ids` too, so
    that responses end elsewhere where they ended here. The folder appears complete and synced, or
    not at all; an older model folder of that name is replaced, of a link that which it leads to.
    The folder around it must be there. BadInput if it is the source or not a model folder; OSError
    when it cannot be written.
    """
    folder = way_to(Path(folder))
    source = Path(source_folder)
    files = plan_files(shape, dtype_name, shard_bytes)
    partial = begin(folder, source)
    try:
        write(partial, files, stream)
        complete(folder, files, source, dtype_name, beside, end_ids)
    finally:
        give_up(folder)


def begin(folder: Path, source: Path) -> Path:
    """Make the hidden folder for the files of the model folder `folder`, and clear away what
    earlier ones left.

    The folder around it must be there. BadInput if `folder` is the source or not a model folder;
    OSError when it cannot be made.
    """
    if folder.exists() and (folder.resolve() == source.resolve() or not _replaceable(folder)):
        raise BadInput(
            f"{folder} exists and is the source model or not a model folder; "
            "name another one to save to"
        )
    partial = _hidden(folder, "partial")
    for leftover in (partial, _hidden(folder, "old")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    return partial


def write(
    partial: Path, files: Sequence[ModelFile], stream: Iterable[tuple[ParamSpec, torch.Tensor]]
) -> None:
    """Write and sync these files from whole tensors in Megatron's layout for TP 1, in any order.

    The stream has each tensor of these files once; experts one by one, or all of a layer as one.
    Parts of it that lie in other files are left to those who write them. OSError when one cannot be
    written.

    A safetensors file is the length of its header, 8 bytes; the header, JSON: type, shape and place
    of each tensor; and the values. All is known beforehand, so each tensor goes to its place when
    it comes.
    """
    places: dict[str, tuple[BinaryIO, int]] = {}
    missing = {tensor.name for file in files for tensor in file.tensors}
    with ExitStack() as stack:
        for file in files:
            opened: BinaryIO = stack.enter_context((partial / file.name).open("wb"))
            start = _write_header(opened, file.header)
            for name in file.names:
                places[name] = opened, start + file.header[name]["data_offsets"][0]
        for tensor, full in _one_by_one(stream):
            assert tensor.name in missing, f"{tensor.name} is not in these files, or came twice"
            missing.discard(tensor.name)
            for name, part in split(tensor, full):
                if name in places:
                    target, place = places[name]
                    target.seek(place)
                    values = part.to("cpu", type_of(tensor, files[0].dtype)).contiguous()
                    target.write(values.view(torch.uint8).numpy().data)
    assert not missing, f"the stream ended without {sorted(missing)}"
    for file in files:
        sync(partial / file.name)  # here a network disk says that it is full


def _one_by_one(
    stream: Iterable[tuple[ParamSpec, torch.Tensor]],
) -> Iterator[tuple[ParamSpec, torch.Tensor]]:
    """Take the experts of a layer apart, where they come as one tensor."""
    for tensor, full in stream:
        singles = single_experts(tensor)
        if singles:
            yield from zip(singles, full, strict=True)
        else:
            yield tensor, full


def complete(
    folder: Path,
    files: Sequence[ModelFile],
    source: Path,
    dtype_name: str,
    beside: Mapping[str, str] | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Add what else a model folder has to the files, which are all written, and give it its name.

    An older model folder of that name is replaced. OSError when that fails.
    """
    partial = _hidden(folder, "partial")
    old = _hidden(folder, "old")
    if len(files) > 1:
        (partial / INDEX).write_text(_index(files))
    copy_beside(source, partial, dtype_name)
    _name_ends(partial / GENERATION, end_ids)
    for name, text in (beside or {}).items():
        (partial / name).write_text(text)
    for path in partial.iterdir():
        sync(path)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def give_up(folder: Path) -> None:
    """Delete what was written for a model folder that was not completed; nothing if it was."""
    shutil.rmtree(_hidden(folder, "partial"), ignore_errors=True)


def way_to(folder: Path) -> Path:
    """The model folder itself. Where a link leads to it, the link stays; a run's own way to its
    folder is no such link, see run_folder/owner.py."""
    if folder.is_symlink() or folder.name in ("", ".."):
        return folder.resolve()
    return folder


def plan_files(
    shape: ModelConfig, dtype_name: str, shard_bytes: int = SHARD_BYTES
) -> list[ModelFile]:
    """Lay the model's tensors into files of at most `shard_bytes`, or of one tensor."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    headers: list[dict[str, Any]] = []
    members: list[list[ParamSpec]] = []
    end = shard_bytes
    for tensor in _written(shape):
        for name, size in zip(tensor.hf, tensor.hf_shape, strict=True):
            kept = type_of(tensor, dtype)
            num_bytes = prod(size) * kept.itemsize
            if not headers or end + num_bytes > shard_bytes:
                headers.append({"__metadata__": {"format": "pt"}})
                members.append([])
                end = 0
            headers[-1][name] = {
                "dtype": TYPE_NAMES[kept],
                "shape": size,
                "data_offsets": [end, end + num_bytes],
            }
            end += num_bytes
            if tensor not in members[-1][-1:]:
                members[-1].append(tensor)
    return [
        ModelFile(_file_name(number, len(headers)), dtype, header, tuple(tensors))
        for number, (header, tensors) in enumerate(zip(headers, members, strict=True), 1)
    ]


def _written(shape: ModelConfig) -> Iterator[ParamSpec]:
    """The parameters of the model, each expert one of its own."""
    for tensor in param_table(shape):
        yield from single_experts(tensor) or [tensor]


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return SINGLE
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _index(files: Sequence[ModelFile]) -> str:
    """The text that tells in which file each tensor lies."""
    weight_map = {name: file.name for file in files for name in file.names}
    total = sum(file.num_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _write_header(file: BinaryIO, header: Mapping[str, Any]) -> int:
    """Write a header, padded so that values are aligned to 8 bytes; returns where they start."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return file.tell()


def split(tensor: ParamSpec, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Take a whole Megatron tensor apart into views of its Hugging Face sources."""
    view = local_view(tensor, full, WHOLE)
    if tensor.kv_groups is not None:
        view = view.view(tensor.kv_groups, -1, *tensor.view[1:])
        parts = view.split([size[0] // tensor.kv_groups for size in tensor.hf_shape], dim=1)
    elif len(tensor.hf) > 1:  # one lies behind the other, of one shape
        parts = view.view(len(tensor.hf), *tensor.hf_shape[0])
    else:
        parts = (view,)
    for name, size, part in zip(tensor.hf, tensor.hf_shape, parts, strict=True):
        yield name, part.reshape(size)


def copy_beside(source: Path, folder: Path, dtype_name: str) -> None:
    """Copy config, tokenizer and template files; config.json then names the dtype that was
    written, no quantization, and no layers that are not among the weights."""
    for pattern in BESIDE:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    config = written_config(source, dtype_name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def written_config(source: Path, dtype_name: str) -> dict[str, Any]:
    """The content of config.json beside weights of this type, by that of the folder `source`."""
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    config.pop("quantization_config", None)
    for key in hf_config.FURTHER_LAYERS:
        if key in config:
            config[key] = 0
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype_name
    return config


def _name_ends(path: Path, end_ids: Sequence[int]) -> None:
    """Add ids to what ends a response by this generation_config.json, which need not be there
    yet."""
    if path.is_file():
        content = json.loads(path.read_text())
    else:
        content = {}
    named = content.get("eos_token_id")
    if isinstance(named, list):
        ends = list(named)
    elif named is None:
        ends = []
    else:
        ends = [named]
    missing = [number for number in end_ids if number not in ends]
    if missing:
        content["eos_token_id"] = ends + missing
        path.write_text(json.dumps(content, indent=2) + "\n")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))
