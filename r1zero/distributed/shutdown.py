"""Graceful shutdown and preemption: a signal or the time limit; whoever leaves saves first.

SIGTERM comes from schedulers and from torchrun, SIGUSR1 from Slurm's --signal, SIGINT from Ctrl-C,
SIGHUP from a terminal that is closed. While the run trains they only leave a note; the loop looks
at it between two steps. A second Ctrl-C ends at once, and so does one while there is nothing to
save yet. Slurm's end of a job and `training.exit_before` are moments to be gone by.

Python runs a signal's handler in the main thread, between two instructions: not while that thread
waits in a collective for the others. So a thread of its own takes the notes: the interpreter writes
the number of each signal into a pipe at the moment that it comes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from datetime import datetime
from types import FrameType

from r1zero.errors import BadInput

# Exit codes besides 0, done, and 1, failed. EXIT_REQUEUE (sysexits' EX_TEMPFAIL): all is saved, the
# same command goes on. INTERRUPTED is what shells give a program that Ctrl-C ended.
BAD_INPUT = 2
EXIT_REQUEUE = 75
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
FORM = "minutes, HH:MM:SS or D-HH:MM:SS after the start, or a moment such as 2027-01-31T18:00"


class PreemptionNotice:
    """Reasons for this process to leave early."""

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` in seconds since the epoch."""
        self.deadline = deadline
        self.asked_by: str | None = None
        self._training = False

    def listen(self) -> None:
        """Take note of signals from now on instead of dying of them.

        One that is ignored stays so: `nohup` and a script's background jobs ask for that.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # what this process forks has signals of its own
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _do_nothing)

    def begin(self) -> None:
        """From now on there is something to save: Ctrl-C waits for the end of the step."""
        self._training = True

    def seconds_left(self) -> float:
        if self.deadline is None:
            return float("inf")
        return self.deadline - time.time()

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):  # a byte a signal
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        if number == signal.SIGINT and (self.asked_by or not self._training):
            os._exit(INTERRUPTED)
        if number == signal.SIGTERM and self.asked_by == "SIGINT" and _has_agent():
            os._exit(INTERRUPTED)
        self.asked_by = self.asked_by or signal.Signals(number).name


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """The handler: that there is one keeps the signal from ending the process."""


def _has_agent() -> bool:
    """Whether torchrun's agent started this rank: it answers a second Ctrl-C with SIGTERM."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def deadline(exit_before: str | None) -> float | None:
    """The moment to be gone by, in seconds since the epoch: what is configured or Slurm's end,
    whichever is first."""
    moments = [
        moment
        for moment in (exit_before and parse_moment(exit_before, time.time()), _slurm_end())
        if moment
    ]
    return min(moments, default=None)


def parse_moment(text: str, start: float) -> float:
    """Read `training.exit_before`; returns seconds since the epoch. BadInput when it has none of
    the forms."""
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+(?:\.\d+)?))", text)
    if match is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in match.group(1, 2, 3, 4))
        if match[5]:
            return start + 60 * float(match[5])
        return start + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise BadInput(f"{text} is not a time: give {FORM}") from None


def _slurm_end() -> float | None:
    """When Slurm will end this job; None outside of one, or when there is no limit."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    if (text := os.environ.get("SLURM_JOB_END_TIME", "")).isdecimal():
        return float(text)
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"EndTime=(\d{4}-\S+)", shown)
    if match:
        return datetime.fromisoformat(match[1]).timestamp()
    return None
