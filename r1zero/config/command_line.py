"""Command lines: flags and overrides in any order, and what does not fit told in the words of this
program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from r1zero.distributed.process import is_first, refuse
from r1zero.errors import BadInput, nearest


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaint is one sentence of the job, with exit code 2."""

    def __init__(self, ranks: bool = False, **options: Any) -> None:
        """With `ranks` it takes the flag that torch.distributed.launch gives to each of its
        processes, for nothing."""
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        if ranks:
            self.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse([f"{message}; {self.prog} --help shows the flags"], is_first()))

    # its overloads are for namespaces of other classes, which nobody gives here
    def parse_args(  # type: ignore[override]
        self, arguments: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Parse flags and declared words; what is left is refused."""
        args, left = self._parsed(arguments)
        if left:
            self.error(self._unknown(left[0]))
        return args

    def parse_with_overrides(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse flags; all other words, wherever they stand, are `overrides`."""
        args, words = self._parsed(arguments)
        args.overrides = words
        for word in words:
            if word.startswith("-"):
                self.error(self._unknown(word))
        return args

    def _parsed(self, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        try:
            return self.parse_known_args(arguments)
        except BadInput as error:  # of a path that cannot be expanded
            self.error(str(error))

    def _unknown(self, word: str) -> str:
        """Say what a word that is no flag may have been meant for."""
        if not word.startswith("-"):
            return f"nothing is known about {word!r}"
        flag, equals, value = word.partition("=")
        if "." in flag:
            override = f"{flag.lstrip('-')}={value if equals else 'VALUE'}"
            return f"{flag} is no flag; an override has no dashes in front: {override}"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return f"{flag} is no flag{nearest(flag, known)}"
