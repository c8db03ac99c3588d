"""The owner of a folder: one run at a time; how that is written down, and read by the second.

    .owner/0000003.json     the third run that took this folder: process, host, time
    .owner/0000003.ended    the same file, renamed when the run gave the folder back
    .owner/0000003.1f2e3d4c/    a folder that no other place has, as long as the run has this one

The highest number rules; claim.py makes these files. A run that was killed gives nothing back. On
its own machine its process is looked for. Elsewhere a living run is known by its file's time of
change, which it renews every few seconds: whoever waits compares that time with itself alone, by
his own clock, so no two clocks have to agree.

What a run writes goes by way of the last: FOLDER/.owner/0000003.1f2e3d4c/../../metrics.jsonl leads
nowhere in a folder that was put in the place of FOLDER, whoever writes, on any node, at any time.
Folders must not be made along with those around them there: that would make the way as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from r1zero.distributed import identity
from r1zero.distributed.identity import Identity

FOLDER = ".owner"
NAME = re.compile(r"(\d{7,})\.(json|ended)")
GLANCE_SECONDS = 12.0  # for a sign of life where nothing is taken yet; there is one every 5 seconds
POLL_SECONDS = 0.2
_WAY = re.compile(rf"/{re.escape(FOLDER)}/\d{{7,}}\.[0-9a-f]{{8}}/\.\./\.\.")


def plain(said: object) -> str:
    """Return a text with the paths in it as people know them, without the way that a run takes."""
    return _WAY.sub("", str(said))


@dataclass(frozen=True, slots=True)
class Entry:
    """The file that rules in a folder: the one with the highest number."""

    path: Path
    number: int
    ended: bool

    @property
    def owner(self) -> Identity | None:
        """Who made it; None if that was not written to its end."""
        return identity.read(self.path)

    def __str__(self) -> str:
        given_back = self.path.with_suffix(".ended")  # perhaps since this entry was looked at
        return str(self.owner or identity.read(given_back) or "a process that left no name")

    def is_inherited_by(self, me: Identity) -> bool:
        """Whether Slurm has started `me` in place of the owner."""
        owner = self.owner
        return owner is not None and me.is_restart_of(owner)

    def is_alive(self) -> bool | None:
        """Whether the owner runs; None when that cannot be seen from here."""
        owner = self.owner
        if owner is not None:
            return owner.is_alive()
        return None

    def sign(self) -> tuple[int, int] | None:
        """What changes while the owner lives; None when the file is not there any more."""
        try:
            with self.path.open("rb") as file:  # opening makes NFS ask the server
                status = os.fstat(file.fileno())
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns

    def await_end(self, seconds: float) -> None:
        """Wait until the owner has given the folder back, is dead, or was silent for `seconds`."""
        last = self.sign()
        deadline = time.monotonic() + seconds
        while last is not None and self.is_alive() is not False and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            if (sign := self.sign()) != last:
                last = sign
                deadline = time.monotonic() + seconds


def newest(folder: Path) -> Entry | None:
    """The entry that rules in a folder; None when nobody ever took it."""
    try:
        names = os.listdir(folder / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    matches = [match for name in names if (match := NAME.fullmatch(name))]
    if not matches:
        return None
    number, ended, name = max((int(match[1]), match[2] == "ended", match[0]) for match in matches)
    return Entry(folder / FOLDER / name, number, ended)


def living(entries: Iterable[Entry], seconds: float) -> Entry | None:
    """The first of these whose owner runs, or shows a sign of life within so many seconds."""
    watched = {entry: entry.sign() for entry in entries}
    deadline = time.monotonic() + seconds
    while watched:
        for entry, first in list(watched.items()):
            alive = entry.is_alive()
            sign = entry.sign()
            if alive or (alive is None and sign not in (first, None)):
                return entry
            if alive is not None or sign is None:  # dead, or given back
                del watched[entry]
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS if watched else 0.0)
    return None


def occupant(places: Iterable[Path], me: Identity) -> Entry | None:
    """A run other than `me` that writes into one of these folders, as far as a glance tells."""
    entries = []
    for place in places:
        entry = None
        with contextlib.suppress(OSError):  # that it cannot be looked at is told when it is written
            entry = newest(place)
        if entry is not None and not entry.ended and not entry.is_inherited_by(me):
            entries.append(entry)
    return living(entries, GLANCE_SECONDS)


def check_free(key: str, folder: Path) -> list[str]:
    """Return a sentence if another run writes into the folder that `key` names, or around it."""
    real = Path(os.path.realpath(folder))
    found = occupant((real, *real.parents), identity.mine())
    if found is not None:
        return [sentence(key, folder, found)]
    return []


def sentence(key: str, folder: Path, entry: Entry) -> str:
    """Say who writes where, and what to do."""
    place = entry.path.parents[1]
    same = os.path.realpath(place) == os.path.realpath(folder)
    if same:
        where = f"into {folder}"
    else:
        where = f"into {place}, to which {folder} belongs"
    return (
        f"{key}: another run writes {where}: {entry}; wait for its end, or end it with "
        "SIGTERM, which lets it save, or name another folder"
    )
