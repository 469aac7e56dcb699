"""Text that is safe to print: what comes out of files must not move the cursor or hide what is said."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

MAX_LINE = 1200
"""Characters of a line that are printed: what is wrong, not all of the value that is."""
# Of "other" characters (control, format, surrogate, private, unassigned) and separators these may stay.
_HARMLESS = "\t\n"
_AT_ONCE, _SHORT, _TICK, _LONG = 0.3, 1.5, 1.0, 30.0  # seconds, of :func:`working`
_ERASE = "\x1b[2K"  # the terminal's line
_ASCII = re.compile(r"[\t\n\x20-\x7e]*")


def printable(text: str) -> str:
    r"""``text`` with control characters, direction marks and lone surrogates as escapes: "\x1b[31m".

    Line breaks and tabs stay; a carriage return, which would overwrite the line, does not.
    """
    if _ASCII.fullmatch(text):
        return text
    return "".join(c if c in _HARMLESS or c.isprintable() else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """As :func:`printable`, line breaks escaped too, and its middle left out where it is very long."""
    if len(text) > MAX_LINE:
        half = MAX_LINE // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return printable(text).replace("\n", "\\n")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def short_count(number: float) -> str:
    """Return 3 significant digits: 853k, 135M, 7.62B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on standard error what goes on while the block lasts, apart from the output.

    On a terminal one line counts the seconds, and disappears with the block; elsewhere a line comes after
    a moment and every half minute. The block itself should print nothing.
    """
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    started = time.monotonic()

    def say(over: threading.Event) -> None:
        if over.wait(_AT_ONCE if on_terminal else _SHORT):
            return
        while True:
            seconds = time.monotonic() - started
            took = f" {seconds:.0f} s" if seconds >= _TICK else ""
            line = f"\r{_ERASE}{what} ...{took}" if on_terminal else f"{what} ...{took}\n"
            with suppress(OSError, ValueError):
                sys.stderr.write(line)
                sys.stderr.flush()
            if over.wait(_TICK if on_terminal else _LONG):
                break
        if on_terminal:
            with suppress(OSError, ValueError):
                sys.stderr.write(f"\r{_ERASE}")
                sys.stderr.flush()

    with beside(say):
        yield


@contextmanager
def beside(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run ``run(over)`` in a thread beside the block; at its end the event is set and the thread joined."""
    over = threading.Event()
    thread = threading.Thread(target=run, args=(over,), name="megarl-beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
