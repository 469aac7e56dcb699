"""Where in a response the answer stands, and how its numbers are written."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?<![\w.])([-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-\u2212]?\.\d+)")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>(?<=\s)[A-Za-z](?![A-Za-z])|-?\d+(?:\.\d+)?))")
_REASONING_END = re.compile(r"</(?:think|thinking|thoughts?|reasoning)>", re.IGNORECASE)
# 1e-05 and 6.02E+23: digits right before the e and right after it; "2e" and "2e - 5" have Euler's number.
_E_NOTATION = re.compile(
    r"(?<![\w.\\}^_])(?P<mantissa>\d+(?:\.\d*)?|\.\d+)[eE](?P<exponent>[-+\u2212]?\d{1,3})(?![\w.]*\d|\w)"
)


def after_reasoning(text: str) -> str:
    """What a response says after its reasoning (``</think>``), all of it where nothing follows."""
    ends = list(_REASONING_END.finditer(text))
    said = text[ends[-1].end() :] if ends else ""
    return said if said.strip() else text


def last_number(text: str) -> str:
    """The last decimal number in ``text`` without thousands separators; "" where there is none.

    A minus counts as a sign when no word or number stands directly before it: "5-3" ends in 3,
    "= -3" in -3. E notation is written out: "1e-3" is 0.001.
    """
    found = _NUMBER.findall(without_e_notation(text))
    return found[-1].replace(",", "").replace("\u2212", "-") if found else ""


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every complete ``\boxed{...}`` (or ``\boxed 4``) that holds something: (start, end, content).

    Braces inside belong to it; of a box in a box the inner one counts.
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
    r"""Position of each brace that is closed, and of the one that closes it; ``\{`` and ``\}`` are text."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def last_boxed(text: str) -> str:
    r"""What the last complete ``\boxed{...}`` holds, braces inside it included; "" where there is none."""
    found = boxes(text)
    return found[-1][2] if found else ""


def without_e_notation(text: str) -> str:
    """``text`` with numbers such as 1e-05 written out: 0.00001."""

    def written_out(match: re.Match[str]) -> str:
        number = f"{match['mantissa']}e{match['exponent'].replace(chr(0x2212), '-')}"
        return number_text(Decimal(number))

    return _E_NOTATION.sub(written_out, text)


def number_text(number: float | Decimal) -> str:
    """A finite number as people write it: 0.00001 instead of 1e-05, 42 instead of 42.0."""
    if isinstance(number, int):
        return str(number)
    exact = number if isinstance(number, Decimal) else Decimal(repr(number))
    text = f"{exact:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def same_number(text: str, other: str) -> bool:
    """Whether both texts are decimal numbers of the same value, with thousands separators or without."""
    try:
        values = [Decimal(part.strip().replace(",", "").replace("\u2212", "-")) for part in (text, other)]
    except InvalidOperation:
        return False
    return values[0].is_finite() and values[0] == values[1]
