"""The one error users see: what went wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Process exit codes of the `kit` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    VERIFICATION = 3
    INTERRUPTED = 130


class KitError(Exception):
    """A failure to report in three lines.

    Args:
        what: what went wrong, one sentence.
        where: the file, recipe field or tensor at fault.
        next_step: what the user can do now.
        exit_code: the process exit code.
    """

    def __init__(self, what: str, *, where: str, next_step: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(what)
        self.what, self.where, self.next_step, self.exit_code = what, where, next_step, exit_code

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  next:  {self.next_step}"


def usage_error(what: str, where: str | Path, next_step: str) -> KitError:
    """An error of how a command was called."""
    return KitError(what, where=str(where), next_step=next_step, exit_code=ExitCode.USAGE)


def closest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? ` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{match[0]}'? " if match else ""
