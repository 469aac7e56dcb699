"""Report of loading a source: rows used, bad, dropped for their length, split into chunks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.errors import UserError

NUM_SHOWN = 3


class TooLongError(UserError):
    """A row exceeds the longest sequence of the run."""


@dataclass
class Tally:
    """A count, with the first few lines."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Count one; keep the line if it is among the first NUM_SHOWN."""
        self.count += 1
        if len(self.first) < NUM_SHOWN:
            self.first.append(line)

    def lines(self, heading: str) -> list[str]:
        """Return the heading (with {} for the count) and the first few lines; [] if the count is 0."""
        if not self.count:
            return []
        shown = "" if self.count <= len(self.first) else f"; the first {len(self.first)}"
        return [f"{heading.format(self.count)}{shown}:", *(f"  {line}" for line in self.first)]


@dataclass
class LoadReport:
    """Findings of loading one source; ``key`` is its configuration key."""

    key: str
    num_rows: int = 0
    num_used: int = 0
    bad: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    chunked: Tally = field(default_factory=Tally)
    cache: str | None = None

    def lines(self) -> list[str]:
        """Return the lines for the user; [] if every row was used unchanged."""
        rows = f"of {self.num_rows} rows"
        return [
            *self.bad.lines(f"{self.key}: {{}} bad {rows} skipped (data.on_bad_row)"),
            *self.dropped.lines(f"{self.key}: {{}} {rows} dropped for their length (data.filter)"),
            *self.chunked.lines(f"{self.key}: {{}} {rows} cut into chunks of the longest sequence"),
            *([self.cache] if self.cache else []),
        ]

    def fail(self) -> UserError:
        """Return the error for bad rows: the first three, and their number."""
        more = [f"{self.key}: {self.bad.count} bad rows in all; data.on_bad_row: skip drops them"]
        return UserError("\n".join(self.bad.first + more * (self.bad.count > 1)))

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the cache file."""
        return asdict(self) | {"cache": None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LoadReport:
        """Restore from :meth:`to_json`."""
        tallies = {name: Tally(**value[name]) for name in ("bad", "dropped", "chunked")}
        return cls(**(value | tallies))
