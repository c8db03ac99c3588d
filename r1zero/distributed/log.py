"""Logging: every rank into its own file, the controller also onto the console."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"
ALL_TELL = 256  # ranks of a world in which each has a log of what it does


def hush_libraries() -> None:
    """Take what libraries warn about off the console, where it would bury the run; call before
    importing them.

    `start_logging` sends it into the rank's file.
    """
    logging.captureWarnings(True)
    logging.getLogger().handlers = [logging.NullHandler()]


class _Console(logging.StreamHandler):
    """Lines above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Be silent from now on when nobody reads any more, as behind `| head`; the run and its log
        go on."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            nowhere = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
            self.setStream(nowhere)
        else:
            super().handleError(record)


class _LateFile(logging.StreamHandler):
    """Writes into a file that it makes with its first line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._opened = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self._opened:
                self.setStream(self._path.open("a"))
                self._opened = True
        except OSError:  # as when the folder was given back: a log stops nobody
            self.handleError(record)
            return
        super().emit(record)


def start_logging(folder: Path, rank: int, size: int, to_console: bool) -> logging.Logger:
    """Set up the logger "r1zero" of this process; `folder` is the run folder's logs/.

    In a world of more than ALL_TELL ranks, those that do not write onto the console tell of
    warnings and errors only, and of errors only where libraries speak. Who has nothing to tell has
    no file.
    """
    log = logging.getLogger("r1zero")
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log on a full disk is told by whoever writes what counts
    folder.mkdir(exist_ok=True)  # NFS may not show yet that it is there
    path = folder / f"rank_{rank:04d}.log"
    file: logging.Handler
    libraries: logging.Handler
    if to_console or size <= ALL_TELL:
        # No FileHandler: it would write the path in another way, which may lead into another
        # folder.
        file = logging.StreamHandler(path.open("a"))
        libraries = file
    else:
        log.setLevel(logging.WARNING)
        file = _LateFile(path)
        libraries = _LateFile(path)
        libraries.setLevel(logging.ERROR)
    for handler in (file, libraries):
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
    log.handlers = [file]
    logging.getLogger().handlers = [libraries]
    if to_console:
        console = _Console(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        console.addFilter(lambda record: record.exc_info is None)  # tracebacks are for the file
        log.addHandler(console)
    for name in ("transformers", "megatron"):
        logging.getLogger(name).handlers = []
    return log
