"""What is wrong with a configuration, and where the user wrote it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Path = tuple[str, ...]
"""A key by its names from the root, ("optimizer", "lr"); users read it with dots."""


def dotted(path: Path) -> str:
    """("optimizer", "lr") as the user writes it: optimizer.lr."""
    return ".".join(path)


@dataclass(frozen=True)
class Violation:
    """One thing to mend: the field it is reported at and one line of explanation.

    ``related`` are other fields that take part; the line number comes from the first that was written.
    """

    path: Path
    message: str
    related: tuple[Path, ...] = ()


@dataclass
class Origins:
    """Where each key was written: 'configs/a.yaml:12' or 'command line'."""

    file: str
    places: dict[Path, str] = field(default_factory=dict)

    def overwrite(self, path: Path, place: str) -> None:
        """``path`` was set anew: forget where it and everything below it came from."""
        self.places = {p: where for p, where in self.places.items() if p[: len(path)] != path}
        self.places[path] = place

    def find(self, violation: Violation) -> str:
        """The place of the first field that was written, else of the nearest enclosing section."""
        path = violation.path
        enclosing = (path[:depth] for depth in range(len(path) - 1, 0, -1))
        written = (self.places[p] for p in (path, *violation.related, *enclosing) if p in self.places)
        return next(written, self.file)

    def report(self, violations: list[Violation]) -> list[str]:
        """The lines the user reads: the file's from top to bottom, then the command line's."""
        placed = sorted(((self.find(v), v) for v in violations), key=lambda pair: self._order(pair[0]))
        return list(dict.fromkeys(f"{dotted(v.path)}: {v.message} [{place}]" for place, v in placed))

    def _order(self, place: str) -> float:
        line = place.removeprefix(f"{self.file}:")
        return 0 if place == self.file else int(line) if line.isdigit() else float("inf")


def show(value: Any) -> str:
    """A value as the user would have written it, shortened."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
