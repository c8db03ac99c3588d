"""The history of a run for the report, read from its folder as it grows.

Folders of older or broken runs are read as far as they go: missing files, missing keys, numbers
that are not finite and half-written lines are left out. When a run was resumed, the lines of the
steps that it did again replace the earlier ones.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from r1zero.algo.losses import stats_of
from r1zero.config.parse import parse_dumped
from r1zero.report.model_scores import columns_of_model, model_scores
from r1zero.report.sample_selection import finite, length_percentiles, pack_step
from r1zero.run_folder.samples import samples_path

SPAN_RANKS = 64  # at most: ranks whose spans are kept and shown
StoredMetrics = dict[str, float | None]


class Lines:
    """The new objects of a JSON-lines file at each call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Read what was appended since the last call, up to the last whole line."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + 1 if whole else 0
        return [entry for entry in map(_parsed, whole.splitlines()) if entry is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None for one that a crash cut in two."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if isinstance(entry, dict):
        return entry
    return None


class Packed:
    """Packed steps that stay below `limit` bytes: when they would not, every second of them goes,
    and so on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.every = 1
        self.steps: dict[int, dict[str, str]] = {}  # by name, "" for what has none

    def due(self, step: int) -> bool:
        """Say whether a step would be kept now."""
        return step % self.every == 0

    def add(self, step: int, packed: str, name: str = "") -> None:
        """Keep a step, or what has this name of it, and thin all of them when that is too much."""
        self.steps.setdefault(step, {})[name] = packed
        while self._size() > self._limit and len(self.steps) > 1:
            self.every *= 2
            self.steps = {step: named for step, named in self.steps.items() if self.due(step)}

    def _size(self) -> int:
        return sum(len(packed) for named in self.steps.values() for packed in named.values())


class RunHistory:
    """A run folder as the report shows it. Packed samples and spans stay below `packed_bytes`."""

    def __init__(self, folder: Path, packed_bytes: int) -> None:
        self.folder = folder
        self._packed = Packed(packed_bytes * 3 // 4)
        self._held_out = Packed(packed_bytes // 4)  # answers to held-out problems
        self._seen: set[Path] = set()  # their files
        self._metrics_lines = Lines(folder / "metrics.jsonl")
        self._span_lines = Lines(folder / "logs" / "spans.jsonl")
        self.metrics: dict[int, StoredMetrics] = {}  # by step, ascending
        self._spans: dict[int, list[list[Any]]] = {}  # of steps that are not packed yet
        self._unread: set[int] = set()  # steps whose samples were not looked at
        self._roles: dict[int, list[str]] = {}  # of the ranks whose spans are shown
        self._resumed: list[int] = []  # first steps of the later attempts

    def read(self, most_files: int | None = None) -> None:
        """Take in what is new; of sample files at most `most_files`, the newest first."""
        for entry in self._metrics_lines.new():
            self._add_metrics(entry)
        for entry in self._span_lines.new():
            self._add_spans(entry)
        for step in sorted(self._unread, reverse=True)[:most_files]:
            self._add_samples(step)
        for path in sorted(set(self.folder.glob("evaluation/**/step_*.parquet")) - self._seen):
            self._add_held_out(path)

    def as_json(self) -> dict[str, Any]:
        """The run as the page's scripts take it."""
        text, config = self._config()
        keys = sorted({key for metrics in self.metrics.values() for key in metrics} - {"step"})
        return {
            "folder": self.folder.resolve().name,
            "name": config.get("name") or self.folder.resolve().name,
            "config": text,
            "lastStep": (config.get("training") or {}).get("train_iters"),
            "stats": [stat.as_json() for stat in stats_of(self._loss(config))],
            "steps": list(self.metrics),
            "series": {
                key: [metrics.get(key) for metrics in self.metrics.values()] for key in keys
            },
            "evaluation": [
                _cleaned(entry) for entry in Lines(self.folder / "evaluation.jsonl").new()
            ],
            "resumed": self._resumed,
            "resets": self._resets(config),
            "roles": self._roles,
            "packedEvery": self._packed.every,
            "packed": {step: named[""] for step, named in self._packed.steps.items()},
            "heldOut": self._held_out.steps,
        }

    def _resets(self, config: dict[str, Any]) -> list[int]:
        """Steps after which the reference took the policy's weights: multiples of an interval."""
        roles = config.get("actor_rollout_ref")
        reference = roles.get("ref") if isinstance(roles, dict) else None
        interval = reference.get("reset_interval") if isinstance(reference, dict) else None
        if not isinstance(interval, int) or interval < 1:
            return []
        return [step for step in self.metrics if step % interval == 0]

    @staticmethod
    def _loss(config: dict[str, Any]) -> str:
        """Name of the policy loss; of configurations older than the key grpo."""
        algorithm = config.get("algorithm")
        if isinstance(algorithm, dict):
            name = algorithm.get("loss")
        else:
            name = None
        return str(name or "grpo")

    def _add_metrics(self, entry: dict[str, Any]) -> None:
        if not isinstance(entry.get("step"), int):
            return
        step = entry["step"]
        # a resumed run does these steps again
        undone = [done for done in self.metrics if done >= step]
        if undone:
            self._resumed = [first for first in self._resumed if first < step] + [step]
        for done in undone:
            del self.metrics[done]
            self._packed.steps.pop(done, None)
            self._unread.discard(done)
        self.metrics[step] = _cleaned(entry)
        self._unread.add(step)

    def _add_spans(self, entry: dict[str, Any]) -> None:
        """Keep [rank, name, start, end] in milliseconds since the step began."""
        ranks = entry.get("ranks", range(SPAN_RANKS))  # older runs have all ranks in their lines
        spans = [span for span in entry.get("spans", []) if span[0] in ranks]
        began = min((span[2] for span in spans), default=0.0)
        if "roles" in entry:
            self._roles = dict(zip(ranks, entry["roles"], strict=False))
        self._spans[entry.get("step", 0)] = [
            [rank, name, round((start - began) * 1e3, 2), round((end - began) * 1e3, 2)]
            for rank, name, start, end in spans
        ]

    def _add_samples(self, step: int) -> None:
        """Read and pack the samples of a step; what is no table of samples counts as none."""
        path = samples_path(self.folder, step)
        spans = self._spans.pop(step, [])
        self._unread.discard(step)
        due = self._packed.due(step)
        try:
            table = pq.read_table(path, columns=None if due else _measured(path))
            self.metrics[step] |= length_percentiles(table) | model_scores(table)
            if due:
                packed = pack_step(table, spans)
            else:
                packed = None
        except (OSError, ValueError, KeyError):  # missing, cut off, or of another form
            if due and spans:
                packed = pack_step(None, spans)
            else:
                packed = None
        if packed:
            self._packed.add(step, packed)

    def _add_held_out(self, path: Path) -> None:
        """Read and pack the answers of an evaluation: step_000010.parquet has those after 10 steps,
        those of a named data set lie in a folder of its name."""
        self._seen.add(path)
        number = path.stem.removeprefix("step_")
        inside = path.parent.relative_to(self.folder / "evaluation")
        name = "" if inside == Path() else str(inside)
        if number.isdecimal() and self._held_out.due(int(number)):
            with contextlib.suppress(OSError, ValueError, KeyError):  # cut off, or of another form
                self._held_out.add(int(number), pack_step(pq.read_table(path), []), name)

    def _config(self) -> tuple[str, dict[str, Any]]:
        """config.yaml as text and parsed; empty when it is missing or broken."""
        path = self.folder / "config.yaml"
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
        else:
            text = ""
        try:
            config = parse_dumped(text)
        except yaml.YAMLError:
            config = None
        return text, config if isinstance(config, dict) else {}


def _measured(path: Path) -> list[str]:
    """The columns of samples that every step is measured by, whether it is packed or not."""
    names = pq.ParquetDataset(path).schema.names
    return ["response_length", *columns_of_model(names)]


def _cleaned(entry: dict[str, Any]) -> dict[str, Any]:
    """Only numbers and nested objects of numbers; what is not finite becomes None."""
    numbers = (int, float, dict, type(None))
    return {
        key: _cleaned(value) if isinstance(value, dict) else finite(value)
        for key, value in entry.items()
        if isinstance(value, numbers)
    }
