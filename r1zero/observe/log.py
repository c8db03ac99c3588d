"""Logging: every rank into its own file, the controller also onto the console."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def start_logging(folder: Path, rank: int, to_console: bool) -> logging.Logger:
    """Set up the logger "r1zero" of this process; `folder` is the run folder's logs/."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("r1zero")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    file = logging.FileHandler(folder / f"rank_{rank:04d}.log")
    file.setFormatter(logging.Formatter(FILE_FORMAT))
    log.addHandler(file)
    if to_console:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(console)
    _collect_noise(log, file)
    return log


def _collect_noise(log: logging.Logger, file: logging.Handler) -> None:
    """Send what libraries warn about into the rank's file: on the console it would bury the run."""
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    noise = logging.getLogger()
    noise.handlers = [file]
    noise.setLevel(logging.WARNING)
    for name in ("transformers", "megatron"):
        logging.getLogger(name).handlers = []
