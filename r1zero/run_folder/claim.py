"""The lock on a run's folders: taking them, keeping them until it ends (files: owner.py).

Taking is making the file of the next number, which the file system, NFS included, grants to one
process only (O_EXCL). Nobody writes into another's file and the highest one is never deleted, so
numbers only rise: a run that looked before others came and went finds its number taken, or a higher
one beside it, and looks again.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r1zero.distributed import identity
from r1zero.distributed.identity import Identity
from r1zero.errors import BadInput
from r1zero.run_folder.owner import FOLDER, NAME, Entry, living, newest, occupant, sentence

BEAT_SECONDS = 5.0  # between two signs of life
# Without one after which a run elsewhere counts as dead. NFS may show what was there a minute ago.
SILENCE_SECONDS = 90.0
CONFIRM_SECONDS = 1.0  # before a folder is believed to be lost
ANY = re.compile(r"(\d{7,})\..+")
MOVED = "{} was moved or removed while this run wrote into it"
OVER = "{}; this run ends and writes nothing more"


class Claim:
    """One folder that this process has taken. Works in the folder itself, wherever it is moved."""

    def __init__(self, key: str, folder: Path, number: int) -> None:
        """Open the folder's .owner, which is made if need be. OSError when that fails."""
        self.key = key
        self.folder = folder
        self.path = folder / FOLDER / f"{number:07d}.json"
        self._mark = f"{self.path.stem}.{os.urandom(4).hex()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)

    @property
    def way(self) -> Path:
        """A path of the folder that leads nowhere when another folder is in its place."""
        return self.path.parent / self._mark / ".." / ".."

    def write(self, me: Identity) -> None:
        """Make the file, and the way. FileExistsError when somebody else was faster; OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = os.open(self.path.name, flags, 0o644, dir_fd=self._handle)
        with open(file, "w") as opened:
            opened.write(me.text())
            opened.flush()
            os.fsync(file)
        os.mkdir(self._mark, dir_fd=self._handle)

    def beat(self) -> None:
        """Show a sign of life. It needs no room on the disk."""
        with contextlib.suppress(OSError):
            os.utime(self.path.name, dir_fd=self._handle)

    def loss(self) -> str | None:
        """What has become of the folder, if it is not this process's any more."""
        try:
            there = os.path.samestat(os.stat(self.path.parent), os.fstat(self._handle))
            entry = newest(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError:
            return None  # a file server that does not answer takes nothing away
        if not there:
            return MOVED.format(self.folder)
        if entry is None or entry.path != self.path:
            return f"{self.folder} was taken over by {entry or 'nobody known'}"
        return None

    def forget_earlier(self) -> None:
        """Delete the files of the runs before, and their ways."""
        for name in os.listdir(self._handle):
            match = ANY.fullmatch(name)
            if match is not None and int(match[1]) < int(self.path.stem):
                if NAME.fullmatch(name):
                    remove = os.unlink
                else:
                    remove = os.rmdir
                with contextlib.suppress(OSError):
                    remove(name, dir_fd=self._handle)

    def release(self) -> None:
        """Give the folder back."""
        ended = self.path.with_suffix(".ended").name
        with contextlib.suppress(OSError):
            os.rename(self.path.name, ended, src_dir_fd=self._handle, dst_dir_fd=self._handle)
        with contextlib.suppress(OSError):
            os.rmdir(self._mark, dir_fd=self._handle)
        self.close()

    def close(self) -> None:
        os.close(self._handle)


class Hold:
    """The folders that this process has taken, perhaps none, until they are given back."""

    def __init__(
        self,
        claims: Sequence[Claim] = (),
        said: Sequence[str] = (),
        on_lost: Callable[[BadInput], None] = lambda error: None,
    ) -> None:
        """Keep them from now on; `on_lost` is called from a thread when one was taken away."""
        self.claims = tuple(claims)
        self.said = tuple(said)
        self._on_lost = on_lost
        self._lost = ""
        self._over = threading.Event()
        if claims:
            threading.Thread(target=self._keep, name="claim", daemon=True).start()

    def check(self) -> None:
        """See that the folders are still this run's, before writing. BadInput when one is not."""
        for claim in self.claims:
            if not self._lost and claim.loss() is not None:
                time.sleep(CONFIRM_SECONDS)
                self._lost = claim.loss() or ""
        if self._lost:
            raise BadInput(OVER.format(self._lost))

    def way(self, path: Path) -> Path:
        """The path of a folder that was taken, or of what is in it, that leads into no other."""
        real = Path(os.path.realpath(path))
        for claim in self.claims:
            folder = os.path.realpath(claim.folder)
            if real.is_relative_to(folder):
                return claim.way / real.relative_to(folder)
        raise AssertionError(f"{path} was not taken")

    def release(self) -> None:
        """Give the folders back; a second call does nothing."""
        if self._over.is_set():
            return
        self._over.set()  # first: what the thread sees from now on is no loss
        for claim in self.claims:
            claim.release()

    def _keep(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self.check()
            except BadInput as error:
                if not self._over.is_set():
                    self._on_lost(error)
                return
            for claim in self.claims:
                claim.beat()


def check_ways(ways: Mapping[Path, Path]) -> None:
    """What a rank without claims can check: `ways` of folders, by the paths that people know."""
    for folder, way in ways.items():
        if not way.exists():
            raise BadInput(OVER.format(MOVED.format(folder)))


def take(
    folders: Mapping[str, Path],
    say: Callable[[str], None],
    on_lost: Callable[[BadInput], None] = lambda error: None,
) -> Hold:
    """Take folders, by the keys that name them. BadInput when another run writes into one of them.

    Waits for signs of life where that takes time, and lets `say` tell so; `on_lost` as in Hold.
    """
    me = identity.mine()
    said: list[str] = []
    claims: list[Claim] = []
    try:
        for key, folder in folders.items():
            claims.append(_take(key, folder, me, say, said))
        _look_around(claims, me)
    except BaseException:
        for claim in claims:
            claim.release()
        raise
    return Hold(claims, said, on_lost)


def _take(
    key: str, folder: Path, me: Identity, say: Callable[[str], None], said: list[str]
) -> Claim:
    """Take one folder."""
    while True:
        before = newest(folder)
        number = 1 if before is None else before.number + 1
        held = before if before is not None and not before.ended else None
        if held is not None and not held.is_inherited_by(me):
            _refuse_living(key, folder, held, say)
            if newest(folder) != held:  # something happened meanwhile
                continue
        claim = _make(key, folder, number, me)
        if claim is None:
            continue
        if held is not None and held.is_inherited_by(me):
            say(
                f"{folder} is taken over from {held}, of an earlier start of this Slurm job; "
                "waiting for its end"
            )
            held.await_end(SILENCE_SECONDS)
        elif held is not None:
            said.append(f"{folder} is taken over from {held}, which ended without giving it back")
        claim.forget_earlier()
        return claim


def _refuse_living(key: str, folder: Path, before: Entry, say: Callable[[str], None]) -> None:
    """Return when the owner of a folder is dead or gives it back. BadInput when it lives."""
    if before.is_alive() is None:
        say(
            f"{folder} was taken by {before}, which cannot be seen from here; waiting up to "
            f"{SILENCE_SECONDS:.0f} s for a sign of life"
        )
    if living([before], SILENCE_SECONDS) is not None:
        raise BadInput(sentence(key, folder, before))


def _make(key: str, folder: Path, number: int, me: Identity) -> Claim | None:
    """Make the file of the next number; None if somebody else was faster.

    BadInput when it cannot be written.
    """
    try:
        claim = Claim(key, folder, number)
        try:
            claim.write(me)
        except FileExistsError:
            claim.close()
            return None
        except OSError:
            claim.release()
            raise
    except OSError as error:
        raise BadInput(
            f"{key}: {folder} cannot be written ({error.strerror}); name another folder"
        ) from None
    if claim.loss() is not None:
        claim.release()
        return None
    return claim


def _look_around(claims: Sequence[Claim], me: Identity) -> None:
    """BadInput when another run writes into a folder around those that were taken, or below."""
    mine = [Path(os.path.realpath(claim.folder)) for claim in claims]
    for claim, real in zip(claims, mine, strict=True):
        below = [*real.glob(f"*/{FOLDER}"), *real.glob(f"*/*/{FOLDER}")]
        places = [*real.parents, *(path.parent for path in below)]
        found = occupant([place for place in places if place not in mine], me)
        if found is not None:
            raise BadInput(sentence(claim.key, claim.folder, found))
