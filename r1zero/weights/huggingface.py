"""Hugging Face folders: read a rank's shards out of one, and write one.

Reading maps the safetensors files and copies only the slices that a shard is made of. Writing puts
each tensor at its place in the files as it comes. Both follow the table in models/params.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from r1zero.errors import BadInput
from r1zero.models.config import ModelConfig
from r1zero.models.params import (
    EMBEDDING,
    OUTPUT_LAYER,
    ParamSpec,
    local_shape,
    local_view,
    param_table,
)
from r1zero.run_folder.durable import sync
from r1zero.weights.detect import CONFIG, INDEX, SINGLE, WeightsOnDisk
from r1zero.weights.headers import HEAD, StoredTensor, read_header, refuse_others, weight_files
from r1zero.weights.source import Weights, refuse_untied

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
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


class HuggingFaceWeights(Weights):
    """The weights of a Hugging Face folder of safetensors files."""

    def __init__(self, found: WeightsOnDisk, shape: ModelConfig) -> None:
        """Open all files and check the whole model. BadInput listing what does not fit."""
        super().__init__(found, shape)
        self._files = _open(found, shape)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of all tensors."""
        result: set[torch.dtype] = set()
        for tensor in param_table(self.shape):
            for name in tensor.hf:
                result.add(FLOATS[self._files[name].get_slice(name).get_dtype()])
        return result

    def read(self, tensor: ParamSpec, tp_rank: int = 0, tp: int = 1) -> torch.Tensor:
        """Read one TP rank's parameter only. BadInput if a tied model has another output layer."""
        part = _read(self._files, tensor, tp_rank, tp)
        if (
            tensor.name in (EMBEDDING, OUTPUT_LAYER)
            and self.shape.tie_word_embeddings
            and HEAD in self._files
        ):
            head = self._files[HEAD].get_slice(HEAD)[
                tp_rank * len(part) : (tp_rank + 1) * len(part)
            ]
            refuse_untied(self.found, part, head)
        return part


def save_hf(
    folder: str | Path,
    shape: ModelConfig,
    stream: Iterable[tuple[ParamSpec, torch.Tensor]],
    source_folder: str | Path,
    dtype_name: str,
    shard_bytes: int = 5 * 10**9,
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
    folder = Path(folder)
    source = Path(source_folder)
    if folder.is_symlink() or folder.name in ("", ".."):  # others keep their way, see owner.py
        folder = folder.resolve()
    if folder.exists() and (folder.resolve() == source.resolve() or not _replaceable(folder)):
        raise BadInput(
            f"{folder} exists and is the source model or not a model folder; "
            "name another one to save to"
        )
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        _write_weights(partial, shape, stream, dtype_name, shard_bytes)
        copy_beside(source, partial, dtype_name)
        _name_ends(partial / GENERATION, end_ids)
        for name, text in (beside or {}).items():
            (partial / name).write_text(text)
        for path in partial.iterdir():
            sync(path)  # here a network disk says that it is full
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# Reading.


def _open(found: WeightsOnDisk, shape: ModelConfig) -> dict[str, safe_open]:
    """Map each tensor's Hugging Face name to its open file. BadInput listing what does not fit."""
    files: dict[str, safe_open] = {}
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(found.folder):
        stored |= read_header(path)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"{path} cannot be read as safetensors ({error}); fetch the model again"
            ) from None
        files.update(dict.fromkeys(file.keys(), file))
    refuse_others(found.folder, stored, shape)
    return files


def _read(files: dict[str, safe_open], tensor: ParamSpec, tp_rank: int, tp: int) -> torch.Tensor:
    """Build one rank's shard from slices of its sources, in the dtype of the file."""
    sources = [files[name].get_slice(name) for name in tensor.hf]
    local = local_shape(tensor, tp)
    if tensor.axis is None:
        return sources[0][:].contiguous()
    if tensor.kv_groups is not None:
        return _read_qkv(sources, tensor, tp_rank * local[0], (tp_rank + 1) * local[0])
    size = tensor.view[tensor.axis] // tp
    cut = slice(tp_rank * size, (tp_rank + 1) * size)
    by_columns = len(sources) == 1 and tensor.axis == 1
    parts = [source[:, cut] if by_columns else source[cut] for source in sources]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def _read_qkv(sources: list, tensor: ParamSpec, start: int, stop: int) -> torch.Tensor:
    """Return the rows start..stop of the fused projection, reading only the key-value groups they
    touch.

    Two groups of two query heads (each name stands for the rows of one head), rank 1 of TP 2:

        linear_qkv     q0 q1 k0 v0 | q2 q3 k1 v1       rows 4 to 7: group 1 alone
        read           q_proj  2 3    k_proj  1    v_proj  1
    """
    groups = tensor.kv_groups
    assert groups is not None, "only fused projections have groups"
    rows = tensor.view[0] // groups  # of one group: its queries, its key, its value
    first = start // rows
    last = -(-stop // rows)
    parts = []
    for source, size in zip(sources, tensor.hf_shape, strict=True):
        share = size[0] // groups
        parts.append(source[first * share : last * share].view(last - first, share, *size[1:]))
    fused = torch.cat(parts, dim=1).view(-1, *tensor.view[1:])
    return fused[start - first * rows : stop - first * rows].contiguous()


# Writing.


def _write_weights(
    folder: Path,
    shape: ModelConfig,
    stream: Iterable[tuple[ParamSpec, torch.Tensor]],
    dtype_name: str,
    shard_bytes: int,
) -> None:
    """Write the stream, in any order, as files of at most `shard_bytes`; an index if there are
    several.

    A safetensors file is the length of its header, 8 bytes; the header, JSON: type, shape and place
    of each tensor; and the values. All is known beforehand, so each tensor goes to its place when
    it comes.
    """
    dtype: torch.dtype = getattr(torch, dtype_name)
    files = _plan_files(shape, dtype, shard_bytes)
    places: dict[str, tuple[BinaryIO, int]] = {}
    missing = {tensor.name for tensor in param_table(shape)}
    with ExitStack() as stack:
        for name, header in files.items():
            file: BinaryIO = stack.enter_context((folder / name).open("wb"))
            start = _write_header(file, header)
            places |= {
                entry: (file, start + header[entry]["data_offsets"][0])
                for entry in header
                if entry != "__metadata__"
            }
        for tensor, full in stream:
            assert tensor.name in missing, (
                f"{tensor.name} is not a tensor of this model, or came twice"
            )
            missing.discard(tensor.name)
            for name, part in _split(tensor, full):
                target, place = places[name]
                target.seek(place)
                target.write(part.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
    assert not missing, f"the stream ended without {sorted(missing)}"
    if len(files) > 1:
        weight_map = {
            name: file
            for file, header in files.items()
            for name in header
            if name != "__metadata__"
        }
        total = shape.num_parameters * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_files(
    shape: ModelConfig, dtype: torch.dtype, shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Lay the tensors into files of at most `shard_bytes`, or of one tensor: headers by file
    name."""
    type_name = next(name for name, known in FLOATS.items() if known == dtype)
    headers: list[dict[str, Any]] = []
    end = shard_bytes
    for tensor in param_table(shape):
        for name, size in zip(tensor.hf, tensor.hf_shape, strict=True):
            num_bytes = prod(size) * dtype.itemsize
            if not headers or end + num_bytes > shard_bytes:
                headers.append({"__metadata__": {"format": "pt"}})
                end = 0
            headers[-1][name] = {
                "dtype": type_name,
                "shape": size,
                "data_offsets": [end, end + num_bytes],
            }
            end += num_bytes
    if len(headers) == 1:
        return {SINGLE: headers[0]}
    return {
        f"model-{number:05d}-of-{len(headers):05d}.safetensors": header
        for number, header in enumerate(headers, 1)
    }


def _write_header(file: BinaryIO, header: dict[str, Any]) -> int:
    """Write a header, padded so that values are aligned to 8 bytes; returns where they start."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return file.tell()


def _split(tensor: ParamSpec, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Take a whole Megatron tensor apart into views of its Hugging Face sources."""
    view = local_view(tensor, full, 1)
    if tensor.kv_groups is not None:
        view = view.view(tensor.kv_groups, -1, *tensor.view[1:])
        parts = view.split([size[0] // tensor.kv_groups for size in tensor.hf_shape], dim=1)
    else:
        if len(tensor.hf) > 1:
            parts = view
        else:
            parts = (view,)
    for name, size, part in zip(tensor.hf, tensor.hf_shape, parts, strict=True):
        yield name, part.reshape(size)


def copy_beside(source: Path, folder: Path, dtype_name: str) -> None:
    """Copy config, tokenizer and template files; config.json then names the dtype that was
    written."""
    for pattern in BESIDE:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype_name
    path.write_text(json.dumps(config, indent=2) + "\n")


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
