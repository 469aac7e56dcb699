"""Outputs that pages print after a command, compared in kind with what the command says.

A block fenced as ```text right below a ```bash block is that block's output. Elsewhere a comment above it
names its command: <!-- output: megarl config optimizer.lr -->.

Words and lines must be the same, in order. Numbers (with times, sizes, versions and percentages), paths and
the width of gaps may differ. A line "..." stands for any lines, "..." at a line's end for its rest. Lines of
a wait, "reading data ... 3 s", do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BLOCK = re.compile(
    r"(?:^<!-- output: (?P<named>[^\n]+?) -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PATH = re.compile(r"(?<![\w/])(?!\w+/s\b)[\w.~-]*(?:/[\w.@~-]+)+/?")
_NUMBER = re.compile(
    r"(?<![A-Za-z\d])[-+]?\d[\d,]*(?:\.\d+)*(?:[eE][-+]?\d+)?(?:[kMBT](?![a-z])|%)?(?::\d\d)*"
)
_WAITING = re.compile(r".+ \.\.\.( # s)?")  # what commands say meanwhile, on a slow machine more of it
ANYTHING = "..."


@dataclass(frozen=True, slots=True)
class Output:
    """A printed output and its command; ``follows``: it stands right below the command's block."""

    command: str
    text: str
    follows: bool


def outputs(page: str) -> Iterator[Output]:
    """Yield the outputs of a page."""
    before, end = None, 0
    for block in _BLOCK.finditer(page):
        if block["language"] == "text":
            if block["named"] is not None:
                yield Output(block["named"], block["body"], follows=False)
            elif before is not None and not page[end : block.start()].strip():
                yield Output(before, block["body"], follows=True)
        before = block["body"] if block["language"] == "bash" else None
        end = block.end()


def in_kind(line: str) -> str:
    """Return a line with placeholders for paths and numbers, and single spaces."""
    return " ".join(_NUMBER.sub("#", _PATH.sub("PATH", line)).split())


def difference(printed: str, real: str) -> str | None:
    """Return how ``real`` differs in kind from the ``printed`` output; None if it does not."""
    expected = [in_kind(line) for line in printed.splitlines() if line.strip()]
    found = [in_kind(line) for line in real.splitlines() if line.strip()]
    found = [line for line in found if not _WAITING.fullmatch(line)]
    reached = _furthest(expected, found)
    if reached is None:
        return None
    wanted = expected[reached] if reached < len(expected) else "the end"
    return f"no line {wanted!r} where the page has it; the command says:\n{real.rstrip()}"


def _furthest(expected: list[str], found: list[str]) -> int | None:
    """Return the first line of ``expected`` that no reading of its "..." finds; None if all are found."""
    places, furthest = {0}, 0  # lines of ``found`` that may come next
    for number, line in enumerate(expected):
        if line == ANYTHING:
            places = set(range(min(places), len(found) + 1))
        else:
            places = {place + 1 for place in places if place < len(found) and _matches(line, found[place])}
        if not places:
            return number
        furthest = number + 1
    return None if len(found) in places else furthest


def _matches(expected: str, found: str) -> bool:
    if expected.endswith(ANYTHING):
        return found.startswith(expected.removesuffix(ANYTHING).rstrip())
    return expected == found
