"""What is told of rows that are no problems: of the first one, or of the whole file.

A fault that all rows have is one of the file, and told as such.
"""

from __future__ import annotations

from collections import Counter

from r1zero.data.layout import ColumnLayout
from r1zero.errors import BadInput


class BadRow(Exception):
    """A row that is no problem."""

    def __init__(self, kind: str, found: str, way_out: str = "") -> None:
        super().__init__(found)
        self.kind = kind  # the same for all rows with one fault
        self.found = found
        self.way_out = way_out  # where all rows are like that; "" = by another column


class NoAnswer(Exception):
    """A row that says that it has no answer; the text is the word for it."""


class Tally:
    """Counts the rows of a data set that are left out, and the system texts among messages."""

    def __init__(self, path: str, layout: ColumnLayout) -> None:
        self._path = path
        self._layout = layout
        self._bad: Counter[str] = Counter()  # by the kind of fault
        self._first: tuple[str, BadRow] | None = None
        self._without: Counter[str] = Counter()  # by the word that stands for an answer
        self._chat_systems: Counter[str] = Counter()  # by what became of them

    def bad(self, place: str, fault: BadRow) -> None:
        """Take note of a bad row."""
        self._bad[fault.kind] += 1
        self._first = self._first or (place, fault)

    def without_answer(self, word: str) -> None:
        """Take note of a row that says that it has no answer."""
        self._without[word] += 1

    def chat_system(self, kept: bool) -> None:
        """Take note of a system text among the messages of a question."""
        self._chat_systems["kept" if kept else "replaced"] += 1

    def conclude(self, total: int) -> list[str]:
        """Say what is left out of `total` rows.

        BadInput for bad rows unless they are skipped, and when no row is left.
        """
        bad = self._bad.total()
        without = self._without.total()
        if not total:
            raise BadInput(f"{self._path} has no rows; name a data set with at least one problem")
        if bad and (not self._layout.skip_bad_rows or bad == total):
            raise BadInput(self._fault(total))
        said = []
        if without:
            words = ", ".join(f"{count} x {word!r}" for word, count in self._without.items())
            said.append(
                f"{self._path}: {without} of {total} rows have no answer to compare with "
                f"and are left out: {words}"
            )
        if bad:
            place, fault = self._first_bad()
            said.append(
                f"{self._path}: {bad} of {total} rows are bad and left out; the first is "
                f"{place}: {fault.found}"
            )
        if bad + without == total:
            raise BadInput(f"no problem is left: {'; '.join(said)}")
        for fate, count in self._chat_systems.items():
            said.append(
                f"{self._path}: the system text in the messages of {count} questions is "
                f"{fate}, see docs/data.md"
            )
        return said

    def _first_bad(self) -> tuple[str, BadRow]:
        """Where the first bad row is, and its fault."""
        assert self._first is not None, "a bad row was counted"
        return self._first

    def _fault(self, total: int) -> str:
        """Tell of the first bad row, or of the file where all rows have the same fault."""
        place, fault = self._first_bad()
        bad = self._bad.total()
        if total > 1 and self._bad[fault.kind] == total:
            where = place.removeprefix(f"{self._path}, ")
            way_out = (
                fault.way_out
                or f"name another column in {self._layout.columns_key}, or correct the file"
            )
            return (
                f"{self._path}: all {total} rows have one fault, such as {where}: "
                f"{fault.found}; {way_out}"
            )
        skip = self._layout.skip_key
        if skip:
            way_out = f", or leave such rows out with {skip}"
        else:
            way_out = ""
        if bad > 1:
            count = f" ({bad} of {total} rows are bad)"
        else:
            count = ""
        return f"{place}: {fault.found}; correct or remove the row{way_out}{count}"
