"""Which files a path of data stands for: itself, or those of a folder that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from r1zero.data.splits import choose, refuse_missing_shards, shown
from r1zero.errors import BadInput

KINDS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")  # may follow those that are texts
# Files that the datasets library of Hugging Face writes beside the data.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DEPTH = 4  # of folders in folders that are looked into


@dataclass(frozen=True, slots=True)
class Sources:
    """The files that a path stands for, and what is to be said about the choice."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def data_files(path: str | Path, held_out: bool = False) -> Sources:
    """Return the files that a path stands for, in the order of their names.

    A folder stands for its files of one kind; those whose names stand for another split than the one
    asked for (`held_out`: evaluation, else training) are left out. A folder that only holds one
    folder with data stands for that. BadInput when nothing is left, files of several kinds, or
    some of a numbered set.
    """
    path = Path(path)
    if not path.is_dir():
        return Sources([path])
    found = {file.name: file for file in _visible(path) if _is_data(file)}
    if not found:
        return _inside(path, held_out)
    notes: list[str] = []
    files = [found[name] for name in choose(str(path), found, held_out, notes)]
    refuse_missing_shards(str(path), [file.name for file in files])
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise BadInput(
            f"{path} holds {' and '.join(kinds)} files; name one file, or a folder with "
            "files of one kind"
        )
    return Sources(files, notes)


def kind_of(path: Path) -> str:
    """Return what ends a file name, such as ".json", without what compression has added."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    if suffixes:
        suffix = suffixes[-1]
    else:
        suffix = ""
    if suffix in (".ndjson", ".jsonlines"):
        return ".jsonl"
    return suffix


def _inside(path: Path, held_out: bool) -> Sources:
    """Look into the folders of a folder that holds no data itself."""
    inside = {entry.name: entry for entry in _visible(path) if entry.is_dir()}
    folders = {name: folder for name, folder in inside.items() if _holds_data(folder, _DEPTH)}
    if not folders:
        raise BadInput(
            f"{path} holds no data files; name a file, or a folder with files of one of "
            f"the kinds {', '.join(KINDS)}"
        )
    notes: list[str] = []
    kept = choose(str(path), folders, held_out, notes)
    if len(kept) > 1:
        raise BadInput(
            f"{path} holds no data files itself, but its folders {shown(kept)} do: name one of them"
        )
    inner = data_files(folders[kept[0]], held_out)
    return Sources(inner.files, notes + inner.notes)


def _holds_data(folder: Path, depth: int) -> bool:
    inside = _visible(folder)
    if any(map(_is_data, inside)):
        return True
    folders = [entry for entry in inside if entry.is_dir()]
    return depth > 0 and any(_holds_data(folder, depth - 1) for folder in folders)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))


def _is_data(path: Path) -> bool:
    return path.is_file() and path.name not in _METADATA and kind_of(path) in KINDS
