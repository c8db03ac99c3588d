"""Logging: every rank into its own file, the controller also onto the console."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"


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


def start_logging(folder: Path, rank: int, to_console: bool) -> logging.Logger:
    """Set up the logger "r1zero" of this process; `folder` is the run folder's logs/."""
    log = logging.getLogger("r1zero")
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log on a full disk is told by whoever writes what counts
    folder.mkdir(exist_ok=True)  # NFS may not show yet that it is there
    # No FileHandler: it would write the path in another way, which may lead into another folder.
    file = logging.StreamHandler((folder / f"rank_{rank:04d}.log").open("a"))
    file.setFormatter(logging.Formatter(FILE_FORMAT))
    log.handlers = [file]
    if to_console:
        console = _Console(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        console.addFilter(lambda record: record.exc_info is None)  # tracebacks are for the file
        log.addHandler(console)
    logging.getLogger().handlers = [file]
    for name in ("transformers", "megatron"):
        logging.getLogger(name).handlers = []
    return log
