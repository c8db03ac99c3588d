"""Progress inside a step, on the controller's terminal: rollout replicas post it, a thread of the
controller shows it.

    step 12:  41/64 samples  812 tok/s  longest running 214
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from r1zero.rollout.interface import EngineListener, RolloutEngine

SECONDS = 1.0  # between two looks


class Poster:
    """Posts a replica's progress every second while it decodes."""

    def __init__(self, engine: RolloutEngine, post: Callable[[str], None]) -> None:
        """Listen to the engine, after those who listen already."""
        self._engine = engine
        self._post = post
        self._at = time.monotonic()
        self._tokens = 0
        engine.listeners.append(EngineListener(on_step=self._on_step))

    def _on_step(self) -> None:
        progress = self._engine.progress()
        now = time.monotonic()
        if now - self._at < SECONDS and progress.done < progress.total:
            return
        if progress.tokens < self._tokens:  # another batch
            self._tokens = 0
        rate = (progress.tokens - self._tokens) / max(now - self._at, 1e-3)
        self._at = now
        self._tokens = progress.tokens
        self._post(json.dumps([progress.done, progress.total, rate, progress.longest]))


class LiveBar:
    """A bar over the steps of a run, with the notices of all replicas behind it. Silent unless
    `shown`."""

    def __init__(
        self, total: int, done: int, notices: Callable[[], Sequence[str | None]], shown: bool
    ) -> None:
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=not shown, dynamic_ncols=True
        )
        self._notices = notices
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="live", daemon=True)
        if shown:
            self._thread.start()

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def close(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._bar.close()

    def _show(self) -> None:
        while not self._ended.wait(SECONDS):
            try:
                text = progress_text(self._notices())
            except RuntimeError:
                return  # the store is gone: the run is ending, and others say why
            self._bar.set_postfix_str(text)


def progress_text(notices: Sequence[str | None]) -> str:
    """Add up the notices of all replicas: samples done, tokens a second, and the longest running
    answer."""
    found = [json.loads(notice) for notice in notices if notice is not None]
    if not found:
        return ""
    done, total, rate = (sum(column) for column in list(zip(*found, strict=True))[:3])
    if done == total:
        return f"{done}/{total} samples, learning"
    longest = max(entry[3] for entry in found)
    return f"{done}/{total} samples, {rate:.0f} tok/s, longest running {longest} tokens"
