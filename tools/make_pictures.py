#!/usr/bin/env python3
"""Make the pictures of README.md and docs/: the system, the curves of a run, and its report.

    python tools/make_pictures.py RUN      # the run folder whose curves and report are shown

Writes docs/system.svg, docs/curves.png, docs/report.png and, when the run left samples,
docs/report_samples.png. Needs the packages of the extra `test` and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from r1zero.errors import BadInput
from r1zero.report.page import open_runs, write_report

DOCS = ROOT / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEW: ViewportSize = {"width": 1400, "height": 1000}
MARGIN = 20

STYLE = """
  .card { fill: #ffffff; stroke: #dfe2e6 } .ink { fill: #1c2127 } .muted { fill: #59626e } .line { stroke: #77818d }
  .head { fill: #77818d } text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif }
  .name { font-weight: 600; font-size: 15px } .small { font-size: 12px } .on { fill: #ffffff; font-size: 11px }
  .rollout { fill: #2f6fde } .ref { fill: #17806f } .train { fill: #b85c0b } .publish { fill: #cf3f69 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #181c21; stroke: #2b3139 } .ink { fill: #e6e9ed } .muted { fill: #9ba5b2 }
  }
"""
# Role: left edge of its box, what it does, what it waits for.
BOXES = {
    "rollout": (40, "samples groups of answers;", "rules score them beside it"),
    "ref": (340, "log-probs under the", "frozen start weights"),
    "train": (640, "advantages, loss, one", "optimizer step a minibatch"),
}
BOX_WIDTH = 220
BOX_TOP = 104
BOX_HEIGHT = 92
# A step in time: start and end of the work on each minibatch, in units of the picture's width.
PIPELINE = {
    "rollout": [(0.00, 0.15), (0.15, 0.30), (0.30, 0.45), (0.45, 0.60)],
    "ref": [(0.16, 0.23), (0.31, 0.38), (0.46, 0.53), (0.61, 0.68)],
    "train": [(0.24, 0.40), (0.40, 0.56), (0.56, 0.72), (0.72, 0.88)],
}
PUBLISH = (0.89, 1.0)


def system_picture() -> str:
    """Draw the roles, what flows between them, and how their work overlaps; returns SVG."""
    plan = "rank 0, which also works, draws the global batch and tells every rank the plan"
    back = "new weights after every global batch: planned, bucketed broadcast (hccl, nccl or gloo)"
    parts = [_text(450, 36, plan, "ink", "middle")]
    for name, (left, first, second) in BOXES.items():
        middle = left + BOX_WIDTH / 2
        parts += [
            _arrow(f"M{middle} 48 V{BOX_TOP - 6}"),
            (
                f'<rect class="{name}" x="{left}" y="{BOX_TOP}" width="{BOX_WIDTH}" '
                'height="6" rx="3"/>'
            ),
            _card(left, BOX_TOP + 4, BOX_WIDTH, BOX_HEIGHT - 4),
            _text(middle, BOX_TOP + 32, f"{name} ranks", "ink name", "middle"),
            _text(middle, BOX_TOP + 54, first, "muted", "middle"),
            _text(middle, BOX_TOP + 72, second, "muted", "middle"),
        ]
    height = BOX_TOP + BOX_HEIGHT / 2
    parts += [
        _arrow(f"M260 {height} H332"),
        _text(298, height - 10, "groups,", "muted small", "middle"),
        _text(298, height + 20, "scores", "muted small", "middle"),
        _arrow(f"M560 {height} H632"),
        _text(598, height - 10, "+ log-", "muted small", "middle"),
        _text(598, height + 20, "probs", "muted small", "middle"),
        _arrow("M750 196 V236 H150 V204"),
        _text(450, 228, back, "muted small", "middle"),
        _text(
            40,
            282,
            "One step: the roles work on different minibatches at the same time",
            "ink name",
        ),
    ]
    parts += _pipeline(left=110, width=750, top=298)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 420" role="img" '
        f'aria-label="Samples flow from rollout over ref to train ranks, weights flow back">\n'
        f"<style>{STYLE}</style>\n"
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
        f"{_card(1, 1, 898, 418)}\n{body}\n</svg>\n"
    )


def _pipeline(left: int, width: int, top: int) -> list[str]:
    """Bars of work by role and minibatch."""
    parts = []
    for row, (role, turns) in enumerate(PIPELINE.items()):
        y = top + 32 * row
        parts.append(_text(left - 14, y + 16, role, "muted", "end"))
        for number, (start, end) in enumerate(turns):
            parts += _bar(role, left + start * width, y, (end - start) * width - 2, f"{number}")
    start, end = PUBLISH
    x = left + start * width
    size = (end - start) * width
    parts += [
        f'<rect class="publish" x="{x:g}" y="{top}" width="{size:g}" height="88" rx="4"/>',
        _text(x + size / 2, top + 48, "publish", "on", "middle"),
    ]
    return parts


def _bar(kind: str, x: float, y: float, width: float, label: str) -> list[str]:
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y}" width="{width:g}" height="24" rx="4"/>',
        _text(x + width / 2, y + 16, label, "on", "middle"),
    ]


def _card(x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="card" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def _arrow(path: str) -> str:
    return f'<path class="line" d="{path}" fill="none" stroke-width="1.5" marker-end="url(#head)"/>'


def photograph(run: Path) -> list[Path]:
    """Take pictures of the report of a run; returns what was written."""
    program = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if program is None:
        raise BadInput("Chromium is not on PATH; on Debian apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        write_report(report, open_runs([run]))
        browser = playwright.chromium.launch(
            executable_path=program, args=["--headless", "--no-sandbox"]
        )
        page = browser.new_page(viewport=VIEW, device_scale_factor=1.1, reduced_motion="reduce")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        written = [
            _shoot(page, "report.png"),
            _shoot(page, "curves.png", "#learning", "#stability"),
        ]
        if page.locator(".browser").count():
            page.get_by_label("Order", exact=True).select_option("best")
            written.append(_shoot(page, "report_samples.png", "#samples", "#samples"))
        browser.close()
    return written


def _shoot(page: Page, name: str, first: str | None = None, last: str = "") -> Path:
    """Photograph the window, or the page from its section `first` to `last`."""
    path = DOCS / name
    if first is None:
        page.screenshot(path=path)
        return path
    above, below = (page.locator(selector).bounding_box() for selector in (first, last))
    assert above is not None and below is not None, (first, last)
    top = above["y"] - MARGIN
    bottom = below["y"] + below["height"] + MARGIN
    page.screenshot(
        path=path,
        full_page=True,
        clip={
            "x": above["x"] - MARGIN,
            "width": above["width"] + 2 * MARGIN,
            "y": top,
            "height": bottom - top,
        },
    )
    return path


def main() -> int:
    """Write all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    args = parser.parse_args()
    try:
        (DOCS / "system.svg").write_text(system_picture())
        written = [DOCS / "system.svg", *photograph(args.run)]
    except BadInput as error:
        print(f"make_pictures: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
