"""One thread a process: several ranks share the cores, and a forked child cannot inherit a thread
pool."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# or each program that a test starts would compile the whole package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

from support.markers import marks_of
from support.npu_worlds import ADAPTOR, NpuServer

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what starts processes, what needs a browser, and the rest as fast
    (support/markers.py)."""
    for item in items:
        fixtures = [
            definitions[-1].func
            for definitions in item._fixtureinfo.name2fixturedefs.values()
            if Path(definitions[-1].func.__code__.co_filename) != Path(__file__)
        ]
        own = [mark.name for mark in item.iter_markers()]
        for mark in sorted(marks_of(item.function, fixtures, item.fixturenames, own)):
            item.add_marker(mark)
    # what is told soon comes first
    items.sort(key=lambda item: item.get_closest_marker("fast") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A tool that a test ran in this process may have set another count. With two threads each, two
    processes on two cores wait for one another in every product."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded tiny model and its data, made once and cached as the default job does."""
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_tiny.py")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    from support.warm_data import read_tiny

    read_tiny()
    return ROOT / ".cache" / "tiny"


@pytest.fixture(scope="session", params=[ADAPTOR])
def npu(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpuServer]:
    """Ranks on a stand-in for torch_npu; the test's name says which adaptor of Megatron they have."""
    server = NpuServer(tmp_path_factory.mktemp("npu") / "server.log")
    yield server
    server.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A small complete configuration: a folder with a model, its model file, data and base.yaml."""
    from support.small_config import make_home

    return make_home(tmp_path)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium; fails with one sentence when the machine has none."""
    from support.browser import start_chromium

    yield from start_chromium()
