"""Look into a checkpoint's pickles without obeying them.

torch_dist checkpoints hold two: .metadata, which torch reads with plain pickle, and common.pt, which it reads
with weights_only. A pickle is a program; here it runs with nothing but stand-ins to call, and tells which names it
asked for. Names outside the allow-list refuse the checkpoint before torch opens it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

# What a table of contents is made of. BytesStorageMetadata is not here: torch would unpickle such entries freely.
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
ALLOWED = {
    *(f"{_METADATA}.{name}" for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING")),
    *(f"{_PLANNER}.{name}" for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "collections.OrderedDict", "pathlib.PosixPath", "torch.Size", "torch.serialization._get_layout",
    *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}


class _StandIn:
    """Takes the place of every class and function that a pickle names; does nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.IOBase) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return _StandIn

    def persistent_load(self, pid: object) -> Any:
        return _StandIn()


def names_in(pickled: bytes) -> set[str]:
    """All classes and functions that a pickle would use. ValueError when it is not a whole pickle."""
    reader = _Reader(io.BytesIO(pickled))
    try:
        reader.load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not a whole pickle ({error})") from None
    return reader.names


def check_pickles(folder: Path) -> None:
    """Check the pickles of a torch_dist checkpoint. ValueError naming what does not belong there."""
    contents = {".metadata": (folder / ".metadata").read_bytes()}
    try:
        with zipfile.ZipFile(folder / "common.pt") as archive:
            contents["common.pt"] = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
    except (zipfile.BadZipFile, StopIteration):
        raise ValueError(f"{folder / 'common.pt'} is damaged: not a file of torch.save") from None
    for file, pickled in contents.items():
        try:
            names = names_in(pickled)
        except ValueError as error:
            raise ValueError(f"{folder / file} is damaged: {error}") from None
        for name in sorted(names):
            if name not in ALLOWED:
                raise ValueError(f"{folder / file} would run {name} when opened, which no checkpoint needs: "
                                 "it is malicious or of an unknown kind, and was not opened")
