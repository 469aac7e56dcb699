"""Classify how a command ends on malformed input: orderly, or with a fault of ours."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.cli import main

LIMIT_SECONDS = 10
_MOST_SAID = 20_000  # characters: what is wrong, not all of what was read


class _Hang(BaseException):
    """Not an Exception: code that catches every Exception must not catch it."""


@dataclass(frozen=True)
class Outcome:
    """A command's exit code (None: it raised or hung), and both of its streams."""

    name: str
    code: Any
    errors: str
    printed: str
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with how it ended; None if it ran, or reported an error the user can fix."""
        if self.code not in (0, 2):
            return f"exit code {self.code}, {self.seconds:.1f} s: {self.errors[-1500:]}"
        if self.code == 2 and "error: " not in self.errors:
            return f"exit code 2 without a line: {self.errors[-500:]!r}"
        if "Traceback (most recent call last)" in self.errors:
            return f"a traceback: {self.errors[-1500:]}"
        if len(self.errors) > _MOST_SAID:
            return f"{len(self.errors)} characters of error: {self.errors[:300]!r}"
        if raw := {c for c in self.errors + self.printed if not (c.isprintable() or c in "\n\t\r")}:
            return f"unprintable characters reach the terminal: {sorted(raw)!r}: {self.errors[-500:]!r}"
        return None


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Hang(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run(name: str, arguments: Sequence[str], limit: int = LIMIT_SECONDS) -> Outcome:
    """Run one command in this process, as the shell would call it."""
    errors, printed, began = io.StringIO(), io.StringIO(), time.monotonic()
    environ = dict(os.environ)
    try:
        with _limited(limit), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
            code: Any = main(list(arguments))
    except SystemExit as error:  # argparse
        code = error.code
    except BaseException:
        code = None
        errors.write(traceback.format_exc(limit=-4))
    os.environ.clear()
    os.environ.update(environ)
    return Outcome(name, code, errors.getvalue(), printed.getvalue(), time.monotonic() - began)


def faults(outcomes: Sequence[Outcome]) -> str:
    """All faults among these, for an assertion's message; empty where there are none."""
    return "\n".join(f"{each.name}: {each.fault}" for each in outcomes if each.fault)
