"""Chromium for the tests of the report: pages from disk, with everything that goes wrong noted
down."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.patience import LONG

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = (1400, 900), (390, 844)


@dataclass
class Opened:
    """A page, the addresses it asked for, and what its console and scripts complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def start_chromium() -> Iterator[Browser]:
    """Yield headless Chromium; fail with one sentence when the machine has none."""
    found = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    if found is None:
        pytest.fail(
            "the report is tested in Chromium, but none is on PATH: apt-get install chromium",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(
    browser: Browser, path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light"
) -> Iterator[Opened]:
    """Open a report from disk and wait until it is drawn."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(1000 * LONG)
    result = Opened(context.new_page())
    result.page.on("request", lambda request: result.requests.append(request.url))
    result.page.on("pageerror", lambda error: result.complaints.append(str(error)))
    result.page.on(
        "console", lambda message: result.complaints.append(f"{message.type}: {message.text}")
    )
    result.page.goto(path.resolve().as_uri())
    result.page.wait_for_selector("html[data-ready]", timeout=1000 * LONG)
    yield result
    context.close()
