"""Text that is safe to print: what comes out of files must not move the cursor or hide what is said."""

from __future__ import annotations

import re
import sys

MAX_LINE = 1200
"""Characters of a line that are printed: what is wrong, not all of the value that is."""
# Of "other" characters (control, format, surrogate, private, unassigned) and separators these may stay.
_HARMLESS = "\t\n"
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


def announce(what: str) -> None:
    """Say on a terminal what the next seconds are spent on, apart from the output."""
    if sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
