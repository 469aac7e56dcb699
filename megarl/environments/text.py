"""Where in a response the answer stands."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\d[\d,]*(?:\.\d+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_number(text: str) -> str:
    """The last decimal number in ``text`` without thousands separators; "" where there is none.

    A minus counts as a sign when no word or number stands directly before it: "5-3" ends in 3,
    "= -3" in -3.
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("\u2212", "-") if found else ""


def last_boxed(text: str) -> str:
    r"""What the last complete ``\boxed{...}`` holds, braces inside it included; "" where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for end in range(start, len(text)):
            escaped = text[end - 1] == "\\"
            depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end].strip()
    return ""
