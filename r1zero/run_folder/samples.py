"""The samples of a step in the run folder: rollout replicas write them aside, then all are shown.

    samples/.step_000012.parquet    while it is written
    samples/step_000012.parquet     when it is whole

With one rollout replica this is a file, with several a folder with a file for each; pyarrow and
pandas read both by the same call. It gets its name after the last file was written, so nobody reads
half of a step.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDER = "samples"
NAME = re.compile(r"(?P<aside>\.?)step_(?P<step>\d{6,})\.parquet")


def samples_path(run: Path, step: int) -> Path:
    """Where the samples of a step are in this run folder: a file, or a folder of files."""
    return run / FOLDER / f"step_{step:06d}.parquet"


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """Which steps of a run leave samples, and how their files come about."""

    replicas: int  # of the rollout role
    interval: int  # in steps; 0: none leaves any
    last_step: int

    def due(self, step: int) -> bool:
        """Whether a step leaves samples: every `interval`-th and the last."""
        if not self.interval:
            return False
        return step % self.interval == 0 or step == self.last_step

    def open_share(self, run: Path, step: int, replica: int) -> Path:
        """The file that a replica writes its rows into; its folder is there. OSError."""
        (run / FOLDER).mkdir(
            exist_ok=True
        )  # not the run folder, which somebody may have taken away
        aside = _aside(run, step)
        if self.replicas == 1:
            return aside
        aside.mkdir(exist_ok=True)
        return aside / f"replica_{replica:04d}.parquet"

    def show(self, run: Path, step: int) -> None:
        """Give what all replicas have written its name. OSError."""
        os.replace(_aside(run, step), samples_path(run, step))

    def drop(self, run: Path, step: int) -> None:
        """Remove what was written of a step whose samples are not whole."""
        _remove(_aside(run, step))


def drop_after(run: Path, step: int) -> None:
    """Remove the samples of later steps, and what was not shown. What somebody else keeps there
    stays, such as copies."""
    for path in (run / FOLDER).glob("*step_*.parquet"):
        found = NAME.fullmatch(path.name)
        if found and (found["aside"] or int(found["step"]) > step):
            _remove(path)


def _aside(run: Path, step: int) -> Path:
    shown = samples_path(run, step)
    return shown.with_name(f".{shown.name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
