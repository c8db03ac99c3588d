"""One thread a process: several ranks share the cores, and a forked child cannot inherit a thread
pool."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded tiny model and its data, made once and cached as the default job does."""
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_tiny.py")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return ROOT / ".cache" / "tiny"
