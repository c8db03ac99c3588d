"""Make an embedded tiny model and its problems: python tools/make_tiny.py [tiny|tiny_moe|tiny_mla] [--output DIR] [--force]

Nothing is done when DIR (default .cache/tiny and so on) is there and was made by this very
tools/tiny_recipe.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = "recipe.sha256"

sys.path.insert(0, str(ROOT))

from r1zero.config.keys import EMBEDDED, EMBEDDED_NAMES
from r1zero.data.template import Template


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "name", nargs="?", choices=EMBEDDED_NAMES, default=EMBEDDED_NAMES[0], help="which model"
    )
    parser.add_argument("--output", type=Path, help="folder to make; default .cache/NAME")
    parser.add_argument("--force", action="store_true", help="make it again when it is there")
    args = parser.parse_args()
    folder = args.output or EMBEDDED / args.name
    recipe = recipe_hash()
    if folder.exists() and not (folder / STAMP).is_file():
        print(
            f"{folder} was not made by this tool and is left alone; name another --output",
            file=sys.stderr,
        )
        return 2
    if is_made(folder, recipe) and not args.force:
        print(f"{args.name}: {folder} is up to date")
        return 0
    from tiny_recipe import make  # imports torch and transformers, some seconds

    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)  # before the minute that the rest takes
    except OSError as error:
        print(
            f"{folder.parent} cannot be written ({error.strerror}); name another --output",
            file=sys.stderr,
        )
        return 2
    try:
        make(unfinished, args.name)
        (unfinished / STAMP).write_text(recipe)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            unfinished.rename(folder)  # complete or absent, never half made
        except OSError:
            # another process, on a shared disk, may have been faster
            if not is_made(folder, recipe):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{args.name}: made {folder}")
    return 0


def recipe_hash() -> str:
    """Hash what the result is made from, so that a change of it makes the folder out of date."""
    sources = (ROOT / "tools" / "tiny_recipe.py").read_text() + Template("qwen_r1").render("")
    return hashlib.sha256(sources.encode()).hexdigest()


def is_made(folder: Path, recipe: str) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == recipe


if __name__ == "__main__":
    sys.exit(main())
