"""Find the answer in a response, and normalise its numbers."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?<![\w.])([-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-\u2212]?\.\d+)")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>(?<=\s)[A-Za-z](?![A-Za-z])|-?\d+(?:\.\d+)?))")
_REASONING_END = re.compile(r"</(?:think|thinking|thoughts?|reasoning)>", re.IGNORECASE)
# 1e-05 and 6.02E+23: digits directly before and after the e; in "2e" and "2e - 5" it is Euler's number.
_E_NOTATION = re.compile(
    r"(?<![\w.\\}^_])(?P<mantissa>\d+(?:\.\d*)?|\.\d+)[eE](?P<exponent>[-+\u2212]?\d{1,3})(?![\w.]*\d|\w)"
)


def after_reasoning(text: str) -> str:
    """Return the response after its reasoning (``</think>``); all of it if nothing follows."""
    ends = list(_REASONING_END.finditer(text))
    said = text[ends[-1].end() :] if ends else ""
    return said if said.strip() else text


def last_number(text: str) -> str:
    """Return the last decimal number in ``text`` without thousands separators; "" without one.

    A minus is a sign unless a word or number is directly before it: "5-3" gives 3, "= -3" gives -3. E
    notation is written out: "1e-3" gives 0.001.
    """
    found = _NUMBER.findall(without_e_notation(text))
    return found[-1].replace(",", "").replace("\u2212", "-") if found else ""


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return all complete, non-empty ``\boxed{...}`` (or ``\boxed 4``): (start, end, content).

    Braces inside belong to the content; of nested boxes the inner one counts.
    """
    closing = _closing_braces(text)
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        end = match.end() if match["bare"] else closing.get(match.end() - 1, -1) + 1
        content = match["bare"] or text[match.end() : end - 1].strip()
        if end and content:
            if found and match.start() < found[-1][1]:
                found.pop()
            found.append((match.start(), end, content))
    return found


def _closing_braces(text: str) -> dict[int, int]:
    r"""Return opening -> closing position of matched braces; ``\{`` and ``\}`` are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def last_boxed(text: str) -> str:
    r"""Return the content of the last complete ``\boxed{...}``; "" without one."""
    found = boxes(text)
    return found[-1][2] if found else ""


def without_e_notation(text: str) -> str:
    """Write out numbers such as 1e-05 in ``text``: 0.00001."""

    def written_out(match: re.Match[str]) -> str:
        number = f"{match['mantissa']}e{match['exponent'].replace(chr(0x2212), '-')}"
        return number_text(Decimal(number))

    return _E_NOTATION.sub(written_out, text)


def number_text(number: float | Decimal) -> str:
    """Format a finite number in plain decimals: 0.00001 for 1e-05, 42 for 42.0."""
    if isinstance(number, int):
        return str(number)
    exact = number if isinstance(number, Decimal) else Decimal(repr(number))
    text = f"{exact:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def same_number(text: str, other: str) -> bool:
    """Return whether both texts are decimal numbers of equal value, ignoring thousands separators."""
    try:
        values = [Decimal(part.strip().replace(",", "").replace("\u2212", "-")) for part in (text, other)]
    except InvalidOperation:
        return False
    return values[0].is_finite() and values[0] == values[1]
