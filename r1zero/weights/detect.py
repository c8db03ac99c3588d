"""What kind of weights a path holds, told by file names alone; no torch, so it is asked before any
start.

    Hugging Face    DIR/config.json, *.safetensors
    torch_dist      DIR/latest_checkpointed_iteration.txt, iter_0000010/{metadata.json, .metadata, *.distcp}
    legacy          DIR/latest_checkpointed_iteration.txt, iter_0000010/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

Of a Megatron checkpoint the path may be DIR, and the tracker file tells the iteration, or one
iteration's folder. The tracker holds a number, or `release` for the folder of that name.
"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from r1zero.errors import BadInput

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
LEGACY_FILE = "model_optim_rng.pt"
KINDS = {
    "hf": "Hugging Face folder",
    "torch_dist": "Megatron torch_dist checkpoint",
    "legacy": "Megatron legacy checkpoint",
}
_SHARD = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class ShardPlace(NamedTuple):
    """Whose parameters a legacy file holds: by their index among TP, PP and EP ranks."""

    tp: int
    pp: int = 0
    ep: int = 0


@dataclass(frozen=True, slots=True)
class WeightsOnDisk:
    """Weights on disk."""

    kind: str  # a key of KINDS
    folder: Path  # that holds the files themselves
    iteration: int | None = None  # None: released weights, or no iterations at all
    # Legacy. At PP 1 names have no stage: their second number, read as one here, is then an expert's.
    files: dict[ShardPlace, Path] = field(default_factory=dict)

    @property
    def layout(self) -> ShardPlace:
        """TP, PP and EP sizes of legacy files."""
        tps, pps, eps = zip(*self.files, strict=True)
        return ShardPlace(max(tps) + 1, max(pps) + 1, max(eps) + 1)

    def __str__(self) -> str:
        text = f"{KINDS[self.kind]} {self.folder}"
        if self.iteration is not None:
            text += f", iteration {self.iteration}"
        if self.files:
            text += f", saved at {layout_text(*self.layout)}"
        return text


def layout_text(tp: int, pp: int, ep: int) -> str:
    """Sizes as people write them; EP only of a model with experts."""
    text = f"TP{tp} PP{pp}"
    if ep > 1:
        text += f" EP{ep}"
    return text


def folder_name(tp: int, *others: int) -> str:
    """The folder of a legacy file: after the TP index that of a stage, an expert rank, or both."""
    return f"mp_rank_{tp:02d}" + "".join(f"_{number:03d}" for number in others)


def detect(path: str | Path) -> WeightsOnDisk:
    """Tell what `path` holds. BadInput when it is nothing known, ambiguous, or lacks files."""
    path = Path(path)
    if not path.is_dir():
        raise BadInput(
            f"{path} is not a folder; give a Hugging Face model folder or a Megatron checkpoint"
        )
    if _is_iteration(path):
        number = re.fullmatch(r"iter_(\d+)", path.resolve().name)
        return _iteration(path, int(number[1]) if number else None)
    is_hf = (path / SINGLE).is_file() or (path / INDEX).is_file()
    if (path / TRACKER).is_file():
        if is_hf:
            raise BadInput(
                f"{path} holds a Hugging Face model and Megatron checkpoints: name the "
                "iteration's folder, or move one of the two"
            )
        return _tracked(path)
    others = _iterations(path)
    if is_hf or ((path / CONFIG).is_file() and not others):
        return WeightsOnDisk("hf", path)
    if snapshots := sorted((path / "snapshots").glob("*/")):
        raise BadInput(
            f"{path} is a folder of Hugging Face's cache; the model itself is in "
            f"{' or '.join(map(str, snapshots[-3:]))}: name that"
        )
    if others:
        way_out = f"it has no {TRACKER}: name one of its folders, such as {others[-1]}"
    elif inside := [str(folder) for folder in sorted(path.iterdir()) if _holds_weights(folder)]:
        way_out = f"name {' or '.join(inside[:3])} in it"
    else:
        way_out = f"a Hugging Face model has {CONFIG} and {SINGLE}, a Megatron checkpoint {TRACKER}"
    raise BadInput(f"{path} holds no weights; {way_out}")


def config_folder(load: str | Path, fallback: str | Path) -> Path:
    """Return the folder whose config.json describes the model at `load`, which may be a Megatron
    checkpoint.

    It is `load` itself, or the folder around an iteration's, or else `fallback`: that of the
    tokenizer.
    """
    load = Path(load)
    if not is_megatron(load):
        return load
    around = [load]
    if _is_iteration(load):
        around.append(load.parent)
    return next((folder for folder in around if (folder / CONFIG).is_file()), Path(fallback))


def is_megatron(path: Path) -> bool:
    """Whether a path is that of Megatron checkpoints, sound or not."""
    return (path / TRACKER).is_file() or _is_iteration(path)


def _holds_weights(path: Path) -> bool:
    """Whether a path looks like that of weights, sound or not."""
    try:
        return any((path / name).is_file() for name in (SINGLE, INDEX)) or is_megatron(path)
    except OSError:  # closed to this user
        return False


def check_files(found: WeightsOnDisk) -> list[str]:
    """Look for files of a Megatron checkpoint that are missing, empty or cut off, without reading
    them."""
    if found.kind == "torch_dist":
        needed = [found.folder / ".metadata", found.folder / "common.pt"]
        problems = [f"{path} is missing or empty" for path in needed if not _size(path)]
        if not any(found.folder.glob("*.distcp")):
            problems.append(f"{found.folder} has no .distcp files")
        return [f"{problem}; copy the checkpoint again" for problem in problems]
    # The table of contents of torch's files is at their end, so files that were cut off have none.
    return [
        f"{path} is no file of torch.save, or cut off; copy the checkpoint again"
        for path in found.files.values()
        if not zipfile.is_zipfile(path)
    ]


def _tracked(path: Path) -> WeightsOnDisk:
    text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise BadInput(
            f"{path / TRACKER} says {text[:40]!r} instead of an iteration's number or release; "
            "name an iteration's folder"
        )
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not _is_iteration(folder):
        others = [other for other in _iterations(path) if other != folder]
        if others:
            way_out = f"there is {others[-1]}, which can be named instead"
        else:
            way_out = "copy the checkpoint again"
        if folder.is_dir():
            state = "holds no checkpoint"
        else:
            state = "does not exist"
        raise BadInput(f"{path / TRACKER} says {text}, but {folder} {state}; {way_out}")
    return _iteration(folder, None if text == "release" else int(text))


def _iterations(path: Path) -> list[Path]:
    """The folders of iterations in their order, released weights first."""
    return [
        folder
        for folder in (path / "release", *sorted(path.glob("iter_*")))
        if _is_iteration(folder)
    ]


def _is_iteration(folder: Path) -> bool:
    shards = folder.glob("mp_rank_*")
    return (folder / "metadata.json").is_file() or any(
        _SHARD.fullmatch(entry.name) for entry in shards
    )


def _iteration(folder: Path, number: int | None) -> WeightsOnDisk:
    path = folder / "metadata.json"
    if not path.is_file():
        return WeightsOnDisk("legacy", folder, number, _shards(folder))
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(
            f"{path} does not name the checkpoint's format; copy the checkpoint again"
        ) from None
    if backend != "torch_dist":
        raise BadInput(
            f"{folder} is a Megatron checkpoint in the format {backend}; only torch_dist and "
            "legacy ones can be read: save it with --ckpt-format torch_dist"
        )
    return WeightsOnDisk("torch_dist", folder, number)


def _shards(folder: Path) -> dict[ShardPlace, Path]:
    """The file of each rank.

    Conversions to several layouts may share a folder: the first whole one is taken.
    """
    grids: dict[int, dict[ShardPlace, Path]] = {}  # by how many numbers are in a name
    for entry in sorted(folder.iterdir()):
        if match := _SHARD.fullmatch(entry.name):
            place = [int(text) for text in match.groups() if text is not None]
            grid = grids.setdefault(len(place), {})
            grid[ShardPlace(*place)] = entry / LEGACY_FILE
    missing: list[str] = []
    for numbers, files in sorted(grids.items()):
        missing = _missing(numbers, files)
        if not missing:
            return files
    raise BadInput(
        f"{folder} lacks {LEGACY_FILE} in {', '.join(missing[:8])}; copy the checkpoint again"
    )


def _missing(numbers: int, files: dict[ShardPlace, Path]) -> list[str]:
    """Names of folders that have no file, of those with so many numbers in their name.

    Every TP, PP and EP index goes with every other, but where experts are not cut by TP. There the
    ranks of a stage count through both, and at TP 2, EP 4 only these have files:

        mp_rank_00_000  mp_rank_01_001  mp_rank_00_002  mp_rank_01_003
    """
    tps, pps, eps = (1 + max(sizes) for sizes in zip(*files, strict=True))
    places = itertools.product(range(tps), range(pps), range(eps))
    grid = [ShardPlace(*indices)[:numbers] for indices in places]
    dealt = [place for place in grid if place[-1] % tps == place[0]]
    found = [place[:numbers] for place, path in sorted(files.items()) if path.is_file()]
    if found == dealt:
        return []
    return [folder_name(*place) for place in grid if place not in found]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return 0
