"""Violations of a configuration, with the file and line of each key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Path = tuple[str, ...]
"""Path of a key from the root, e.g. ("optimizer", "lr"); shown to users with dots."""


def dotted(path: Path) -> str:
    """Return a path as the user writes it: optimizer.lr."""
    return ".".join(path)


@dataclass(frozen=True)
class Violation:
    """One error: the field it is reported at and a one-line message.

    ``related`` are other fields involved. The reported line is that of the first field the user set.
    """

    path: Path
    message: str
    related: tuple[Path, ...] = ()


@dataclass
class Origins:
    """Origin of each key: 'configs/a.yaml:12' or 'command line'."""

    file: str
    places: dict[Path, str] = field(default_factory=dict)

    def overwrite(self, path: Path, place: str) -> None:
        """Set the origin of ``path`` and drop the origins of all keys below it."""
        self.places = {p: where for p, where in self.places.items() if p[: len(path)] != path}
        self.places[path] = place

    def find(self, violation: Violation) -> str:
        """Return the origin of the first field that was set, else of a key below it (of an unknown section on
        the command line), else of the nearest enclosing section."""
        path = violation.path
        below = (p for p in self.places if p[: len(path)] == path)
        enclosing = (path[:depth] for depth in range(len(path) - 1, 0, -1))
        written = (self.places[p] for p in (path, *violation.related, *below, *enclosing) if p in self.places)
        return next(written, self.file)

    def report(self, violations: list[Violation]) -> list[str]:
        """Return the error lines, those of the file in order, then those of the command line."""
        placed = sorted(((self.find(v), v) for v in violations), key=lambda pair: self._order(pair[0]))
        return list(dict.fromkeys(f"{dotted(v.path)}: {v.message} [{place}]" for place, v in placed))

    def _order(self, place: str) -> float:
        line = place.removeprefix(f"{self.file}:")
        return 0 if place == self.file else int(line) if line.isdigit() else float("inf")


def show(value: Any) -> str:
    """Format a value as YAML would show it, shortened."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
