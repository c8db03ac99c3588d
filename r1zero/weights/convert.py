"""Hugging Face folders: stream a rank's shards out of one, and write one.

Reading maps the safetensors files and copies only the slices that a shard is made of. Writing holds one
output file in memory. Both follow the table in names.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from r1zero.model import ModelShape
from r1zero.weights.names import Tensor, local_shape, local_view, tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("BF16", "F16", "F32", "F64")
BESIDE = ("config.json", "generation_config.json", "*token*.json", "chat_template*", "vocab.*", "merges.txt",
          "*.model", "LICENSE*")  # files of the source folder that belong to the model, tokenizer included


def check_hf(folder: str | Path, shape: ModelShape) -> None:
    """Check, reading headers only, that the folder holds the model. ValueError listing what is wrong."""
    _open(Path(folder), shape)


def load_hf(folder: str | Path, shape: ModelShape, wanted: Iterable[Tensor], tp_rank: int, tp: int,
            dtype: torch.dtype) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """Check the folder, then stream this TP rank's shard of each wanted tensor, in Megatron's layout.

    The whole model is checked, not only what is wanted, so that all ranks fail alike. ValueError listing
    missing, misshaped and unexpected tensors.
    """
    folder = Path(folder)
    files = _open(folder, shape)

    def stream() -> Iterator[tuple[Tensor, torch.Tensor]]:
        for tensor in wanted:
            part = _read(files, tensor, tp_rank, tp)
            if tensor.hf == ("model.embed_tokens.weight",) and shape.tied and "lm_head.weight" in files:
                _check_tied(folder, part, files["lm_head.weight"].get_slice("lm_head.weight"), tp_rank)
            yield tensor, part.to(dtype)

    return stream()


def save_hf(folder: str | Path, shape: ModelShape, stream: Iterable[tuple[Tensor, torch.Tensor]],
            source_folder: str | Path, dtype_name: str, shard_bytes: int = 5 * 10**9) -> None:
    """Write a Hugging Face folder from whole tensors in Megatron's layout for TP 1, in any order.

    `dtype_name` is torch's ("bfloat16"). Files are at most `shard_bytes` long, unless one tensor is longer.
    The folder appears complete or not at all; an older model folder of that name is replaced. ValueError if
    it is the source or not a model folder.
    """
    folder, source = Path(folder), Path(source_folder)
    if folder.exists() and (folder.resolve() == source.resolve() or not _replaceable(folder)):
        raise ValueError(f"{folder} exists and is the source model or not a model folder; "
                         "name another one to save to")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, shape, stream, dtype_name, shard_bytes)
        _copy_beside(source, partial, dtype_name)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# Reading.


def _open(folder: Path, shape: ModelShape) -> dict[str, safe_open]:
    """Map each tensor's Hugging Face name to its open file. ValueError listing what does not fit."""
    files: dict[str, safe_open] = {}
    for path in _weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); "
                             "fetch the model again") from None
        files.update(dict.fromkeys(file.keys(), file))
    expected = {name: size for tensor in tensors(shape)
                for name, size in zip(tensor.hf, tensor.hf_shape, strict=True)}
    problems = [f"{name} is missing" for name in expected if name not in files]
    for name, file in files.items():
        if name in expected:
            problems += _misfit(name, file.get_slice(name), expected[name])
        elif not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and shape.tied):
            problems.append(f"{name} is unexpected")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"the weights in {folder} do not fit its config.json: {shown}")
    return files


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; "
                         "weights in another format must be saved as safetensors first")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r}); "
                         "fetch the model again") from None


def _misfit(name: str, source, expected: tuple[int, ...]) -> list[str]:
    found, dtype = tuple(source.get_shape()), source.get_dtype()
    if found != expected:
        return [f"{name} has the shape {found} instead of {expected}"]
    return [] if dtype in FLOATS else [f"{name} has the type {dtype} instead of one of {', '.join(FLOATS)}"]


def _read(files: Mapping[str, safe_open], tensor: Tensor, tp_rank: int, tp: int) -> torch.Tensor:
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


def _read_qkv(sources: list, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    """Return the rows start..stop of the fused projection, reading only the key-value groups they touch."""
    groups = tensor.kv_groups
    rows = tensor.view[0] // groups  # of one group: its queries, its key, its value
    first, last = start // rows, -(-stop // rows)
    parts = []
    for source, size in zip(sources, tensor.hf_shape, strict=True):
        share = size[0] // groups
        parts.append(source[first * share:last * share].view(last - first, share, *size[1:]))
    fused = torch.cat(parts, dim=1).view(-1, *tensor.view[1:])
    return fused[start - first * rows:stop - first * rows].contiguous()


def _check_tied(folder: Path, embedding: torch.Tensor, head, tp_rank: int) -> None:
    """Refuse a separate output layer in a model that claims to have none: one of the two would be lost."""
    rows = len(embedding)
    if not torch.equal(embedding, head[tp_rank * rows:(tp_rank + 1) * rows]):
        raise ValueError(f"the weights in {folder} have an lm_head.weight that differs from the embedding "
                         "although its config.json says tie_word_embeddings: true; set that to false, or "
                         "drop lm_head.weight")


# Writing.


def _write_weights(folder: Path, shape: ModelShape, stream: Iterable[tuple[Tensor, torch.Tensor]],
                   dtype_name: str, shard_bytes: int) -> None:
    """Write the stream as files of at most `shard_bytes`, with an index when there are several."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    missing = {tensor.name for tensor in tensors(shape)}
    shards: list[list[str]] = []  # names in each file written
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for tensor, full in stream:
        assert tensor.name in missing, f"{tensor.name} is not a tensor of this model, or came twice"
        missing.discard(tensor.name)
        for name, part in _split(tensor, full):
            num_bytes = part.numel() * dtype.itemsize
            if pending and size + num_bytes > shard_bytes:
                flush()
                size = 0
            # Always a copy: the giver may reuse its buffer for the next tensor.
            pending[name] = part.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
            size, total = size + num_bytes, total + num_bytes
    assert not missing, f"the stream ended without {sorted(missing)}"
    flush()
    _name_files(folder, shards, total)


def _split(tensor: Tensor, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Take a whole Megatron tensor apart into views of its Hugging Face sources."""
    view = local_view(tensor, full, 1)
    if tensor.kv_groups is not None:
        view = view.view(tensor.kv_groups, -1, *tensor.view[1:])
        parts = view.split([size[0] // tensor.kv_groups for size in tensor.hf_shape], dim=1)
    else:
        parts = view if len(tensor.hf) > 1 else (view,)
    for name, size, part in zip(tensor.hf, tensor.hf_shape, parts, strict=True):
        yield name, part.reshape(size)


def _name_files(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the parts their final names, which tell how many there are."""
    count = len(shards)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [SINGLE]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_beside(source: Path, folder: Path, dtype_name: str) -> None:
    """Copy config, tokenizer and template files; config.json then names the dtype that was written."""
    for pattern in BESIDE:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype_name
    path.write_text(json.dumps(config, indent=2) + "\n")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))
