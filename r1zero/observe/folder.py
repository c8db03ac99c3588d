"""The run folder: made fresh for each run; what an earlier run left is moved aside, never overwritten."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(output_dir: str) -> list[str]:
    """Return a sentence if `output_dir` cannot be made or written."""
    folder = Path(output_dir)
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return []
    except OSError as error:
        return [f"output_dir: {output_dir} cannot be written ({error.strerror} in {folder}); name another folder"]


def start_folder(folder: Path, config: str) -> list[str]:
    """Make the run folder with its config.yaml and logs/; return what should be said about it.

    A folder that holds the metrics of an earlier run is renamed to <folder>.1, .2, ...
    """
    said = []
    if (folder / "metrics.jsonl").exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        said.append(f"the earlier run in {folder} is now in {aside}")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    return said
