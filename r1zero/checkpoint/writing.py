"""Files of a checkpoint that one rank writes: at once, or beside the training from a copy."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from r1zero.checkpoint.manifest import File


class FileWriting(ABC):
    """A rank's part of a save under way."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}  # that were written, by their names in the checkpoint
        self.error: str | None = None  # why they could not be
        self._thread: threading.Thread | None = None

    @abstractmethod
    def copy(self) -> None:
        """Copy what is to be written to host memory: training goes on and changes it."""

    @abstractmethod
    def run(self) -> None:
        """Write and sync the files, and describe them; `error` then says what went wrong."""

    def start(self) -> None:
        """Write beside the training, from a copy. A process that fails meanwhile does not wait for
        it."""
        self.copy()
        self._thread = threading.Thread(target=self.run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
