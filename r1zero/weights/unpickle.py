"""Read what others pickled without running anything of it.

Checkpoints hold more than tensors: arguments, enums, random states. Of all that only plain data, argparse's
Namespace and torch's own records are built. Names from packages known to write checkpoints become an inert
stand-in; any other name is refused, whatever it is.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata

# Their classes appear in real checkpoints; nothing of them is imported or called.
FAMILIAR = ("megatron", "mindspeed", "mindspeed_llm", "modellink", "numpy", "pathlib", "signal", "datetime",
            "transformer_engine", "_io")
_BUILT = {f"{known.__module__}.{known.__qualname__}": known for known in (
    filesystem._StorageInfo, metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata,
    metadata.ChunkStorageMetadata, metadata.BytesStorageMetadata, metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING, torch.Size, torch.serialization._get_layout, set,
    Namespace, SimpleNamespace)}


# What unpickling damaged files raises; TypeError and the like when a record is not what it was.
_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError,
               pickle.UnpicklingError)


class Unfamiliar(ValueError):
    """A pickle names something that no checkpoint needs."""


class Inert:
    """Stands for an object that nothing here needs: takes any arguments and state, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_pickled(path: Path) -> Any:
    """Load a file of torch.save; tensors stay on disk until they are touched. ValueError if bad or unsafe."""
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _UNREADABLE as error:
        raise _damaged(path, error) from None
    _refuse_unfamiliar(path, strange)
    try:
        with torch.serialization.safe_globals([(_BUILT.get(name, Inert), name) for name in strange]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _UNREADABLE as error:
        raise _damaged(path, error) from None


def load_metadata(path: Path) -> metadata.Metadata:
    """Load the .metadata of a torch_dist checkpoint, a plain pickle. ValueError if bad or unsafe."""
    try:
        content = path.read_bytes()
        found = _MetadataUnpickler(io.BytesIO(content), path).load()
    except Unfamiliar:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, error) from None
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"{path} holds no metadata of a checkpoint; copy the checkpoint again")
    return found


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if not module.startswith("torch.distributed."):
            _refuse_unfamiliar(self._path, [full])
        return _BUILT.get(full, Inert)


def _refuse_unfamiliar(path: Path, names: list[str]) -> None:
    unfamiliar = [name for name in names if name not in _BUILT and name.partition(".")[0] not in FAMILIAR]
    if unfamiliar:
        raise Unfamiliar(f"{path} wants to call {', '.join(sorted(unfamiliar)[:5])}, which no checkpoint "
                         "needs: it may be hostile; nothing of it was run. Use another copy")


def _damaged(path: Path, error: Exception) -> ValueError:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} cannot be read ({cause}); copy the checkpoint again")
