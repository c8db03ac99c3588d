"""The observer of a run, on the controller: metrics, samples, trackers, report, alarms.

Nothing here may stop a step but the two that are meant to: a broken invariant and too many failed
scores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from r1zero.config.parse import parse_dumped
from r1zero.distributed.board import Board
from r1zero.distributed.groups import World
from r1zero.observe.alarms import Alarms
from r1zero.observe.console import step_line
from r1zero.observe.live import LiveBar
from r1zero.observe.spans import spans_entry
from r1zero.observe.trackers import Sinks, open_tracker
from r1zero.report.page import LiveReport
from r1zero.reward.failure_limit import FailureGuard
from r1zero.run_folder.claim import Hold
from r1zero.run_folder.folder import append_line
from r1zero.run_folder.owner import plain
from r1zero.run_folder.samples import SampleFiles, samples_path
from r1zero.types import RankRecord, StepOutcome

log = logging.getLogger("r1zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverConfig:
    """What the observer needs of a run."""

    run_name: str
    total_steps: int
    report_interval: int  # in steps; 0: only at the end
    trackers: Sequence[str]
    max_failure_rate: float  # of scores
    stop_on_broken_invariant: bool
    config_text: str  # the whole configuration, for the trackers


class IdleObserver:
    """The observer of a rank that is not the controller: sees nothing, shows nothing."""

    def after_step(self, outcome: StepOutcome) -> None:
        pass

    def after_evaluation(self, step: int, scores: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class Observer:
    """Sees every step of a run. Lives on the controller."""

    def __init__(
        self,
        config: ObserverConfig,
        world: World,
        hold: Hold,
        *,
        folder: Path,
        samples: SampleFiles,
        steps_done: int,
        mismatch_limit: float,
        faster_split: Callable[[Sequence[Mapping[str, float]]], str | None],
        live: bool,
    ) -> None:
        """Open the trackers.

        `hold` is on the run's folders; `folder` is that of the run, by the path to write by
        (Hold.way). `mismatch_limit` and `faster_split` as in Alarms. With `live`
        a bar is shown on the terminal.
        """
        self._config = config
        self._world = world
        self._hold = hold
        self._folder = folder
        self._samples = samples
        self._total = config.total_steps
        self._report = LiveReport(self._folder, config.report_interval)
        self._guard = FailureGuard(config.max_failure_rate)
        self._alarms = Alarms(mismatch_limit, config.max_failure_rate, faster_split)
        keys = parse_dumped(config.config_text)
        self._sinks = Sinks(
            {
                kind: partial(open_tracker, kind, self._folder, config.run_name, keys)
                for kind in config.trackers
            }
        )
        board = Board(world.store)
        replicas = range(world.placement.rollout.dp)
        self._bar = LiveBar(
            self._total,
            steps_done,
            lambda: [board.read(f"rollout/{replica}") for replica in replicas],
            live,
        )
        self._unwritten: set[str] = set()  # files whose trouble was told
        self._began = time.monotonic()
        self._seconds = 0.0

    def after_step(self, outcome: StepOutcome) -> None:
        """Keep, show and check a step.

        RuntimeError if it must be the last one; BadInput if the run folder was taken away.
        """
        self._hold.check()
        began = time.monotonic()
        metrics = outcome.metrics | {"invariants/broken": len(outcome.broken)}
        step = int(metrics["step"])
        self._keep(step, metrics, outcome)
        self._sinks.put(step, metrics)
        self._bar.step()
        log.info(step_line(metrics, self._total))
        for sentence in self._alarms.look(metrics):
            log.warning("warning: step %d: %s", step, sentence)
        self._report.after_step(step)
        self._seconds += time.monotonic() - began
        self._enforce(step, outcome)

    def after_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Keep what an evaluation found."""
        self._write("evaluation.jsonl", append_line, {"step": step, **scores})
        self._sinks.put(step, {f"evaluation/{key}": value for key, value in scores.items()})

    def finish(self) -> None:
        """Write the last report, and say what all this took."""
        self._report.finish()
        passed = time.monotonic() - self._began
        log.info(
            "observing took %.2f s of %.0f s (%.2f%%)",
            self._seconds,
            passed,
            100 * self._seconds / passed,
        )

    def close(self) -> None:
        """End bar and trackers."""
        self._bar.close()
        self._sinks.close()

    def _keep(self, step: int, metrics: dict[str, float], outcome: StepOutcome) -> None:
        spans = spans_entry(step, self._world.placement, outcome.records)
        self._write("metrics.jsonl", append_line, metrics)
        self._write("logs/spans.jsonl", append_line, spans)
        if self._samples.due(step):
            name = str(samples_path(Path(), step))
            self._write(name, self._show_samples, step, outcome.records)

    def _show_samples(self, path: Path, step: int, records: Sequence[RankRecord]) -> None:
        """Show the rows that all rollout replicas have written; OSError if one could not."""
        unwritten = next((record.unwritten for record in records if record.unwritten), None)
        if unwritten:
            self._samples.drop(self._folder, step)
            raise OSError(unwritten)
        self._samples.show(self._folder, step)

    def _write(self, name: str, write: Callable[..., None], *args: Any) -> None:
        """Write a file of the run folder; trouble is told once for each kind of file.

        BadInput if the trouble is that the folder was taken away.
        """
        try:
            write(self._folder / name, *args)
        except OSError as error:
            self._hold.check()
            kind = name.split("/")[0]
            if kind not in self._unwritten:
                self._unwritten.add(kind)
                log.warning(
                    "warning: %s could not be written: %s; training goes on without it",
                    name,
                    plain(error),
                )

    def _enforce(self, step: int, outcome: StepOutcome) -> None:
        if outcome.broken:
            told = f"step {step}: invariant broken: {'; '.join(outcome.broken)}"
            if self._config.stop_on_broken_invariant:
                raise RuntimeError(f"{told} (training.on_broken_invariant: warn would go on)")
            log.warning("warning: %s", told)
        self._guard.check(outcome.samples)
