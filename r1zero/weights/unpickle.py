"""Safe unpickling: read what others pickled without obeying it.

A pickle is a program, and checkpoints are full of them: arguments, enums, random states, tables of
contents. Of all that only plain data, argparse's Namespace and torch's own records are built. Names
from packages known to write checkpoints become an inert stand-in; any other name refuses the file,
whatever it is.

Our own checkpoints are opened by Megatron, and torch obeys their .metadata. So `check_pickles` goes
through them before, with stand-ins for everything and a shorter list. It runs before any start,
hence without torch.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from r1zero.errors import BadInput

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

# Their classes appear in real checkpoints; nothing of them is imported or called.
FAMILIAR = (
    "megatron",
    "mindspeed",
    "mindspeed_llm",
    "modellink",
    "numpy",
    "pathlib",
    "signal",
    "datetime",
    "transformer_engine",
    "_io",
)
_TORCH = "torch.distributed.checkpoint"
_DTYPE = re.compile(r"torch\.(bool|(b?float|u?int|complex)\d+(_\w+)?)")
_RECORDS = {
    *(
        f"{_TORCH}.metadata.{name}"
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_TORCH}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
}
# What our own tables of contents are made of. BytesStorageMetadata is not: torch unpickles such
# entries freely.
_OURS = _RECORDS | {
    *(
        f"{_TORCH}.planner.{name}"
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    f"{_TORCH}.metadata.StorageMeta",
    "collections.OrderedDict",
    "pathlib.PosixPath",
}
_BUILT = _RECORDS | {
    f"{_TORCH}.metadata.BytesStorageMetadata",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "builtins.set",
}

# What unpickling damaged files raises; TypeError and the like when a record is not what it was.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class Unfamiliar(BadInput):
    """A pickle names something that no checkpoint needs."""


class Inert:
    """Stands for what nothing here needs: takes any arguments and state, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _GuardedUnpickler(pickle.Unpickler):
    """Loads a pickle of nothing but `known` names; makes those that are `built`, stand-ins of the
    others."""

    def __init__(
        self, path: Path, content: bytes, known: Callable[[str], bool], built: Callable[[str], bool]
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path
        self._known = known
        self._built = built

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if not self._known(full):
            raise _unfamiliar(self._path, [full])
        if self._built(full):
            return resolve_name(full)
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return Inert()


def check_pickles(folder: Path) -> None:
    """Go through the pickles of a checkpoint of ours. BadInput naming what does not belong
    there."""
    with _told(folder / ".metadata") as path:
        _GuardedUnpickler(path, path.read_bytes(), _is_ours, _never).load()
    with _told(folder / "common.pt") as path, zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                _GuardedUnpickler(path, archive.read(name), _is_ours, _never).load()


def load_metadata(folder: Path) -> Metadata:
    """Load the .metadata of a torch_dist checkpoint, a plain pickle. BadInput if bad or unsafe."""
    with _told(folder / ".metadata") as path:
        found = _GuardedUnpickler(path, path.read_bytes(), _is_familiar, _is_built).load()
    if type(found).__name__ != "Metadata":
        raise BadInput(f"{path} holds no metadata of a checkpoint; copy the checkpoint again")
    return found


def load_pickled(path: Path) -> Any:
    """Load a file of torch.save; tensors stay on disk until they are touched. BadInput if bad or
    unsafe."""
    import torch

    with _told(path):
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unfamiliar := [name for name in strange if not _is_familiar(name)]:
            raise _unfamiliar(path, unfamiliar)
        known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (resolve_name(name) if _is_built(name) else Inert, name) for name in strange
        ]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _is_ours(name: str) -> bool:
    return name in _OURS or _DTYPE.fullmatch(name) is not None


def _is_built(name: str) -> bool:
    return name in _BUILT or _DTYPE.fullmatch(name) is not None


def _is_familiar(name: str) -> bool:
    return (
        _is_built(name)
        or name.startswith("torch.distributed.")
        or name.partition(".")[0] in FAMILIAR
    )


def _never(_: str) -> bool:
    return False


def _unfamiliar(path: Path, names: list[str]) -> Unfamiliar:
    return Unfamiliar(
        f"{path} would run {', '.join(sorted(names)[:5])} when opened, which no checkpoint needs: "
        "it may be hostile, and nothing of it was run; use another copy"
    )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[Path]:
    """Make one sentence of what happens to unreadable files."""
    try:
        yield path
    except Unfamiliar:
        raise
    except _UNREADABLE as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} cannot be read ({cause}); copy the checkpoint again") from None
