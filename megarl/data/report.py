"""What became of a source's rows: used, bad, dropped for their length, cut into chunks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.errors import UserError

NUM_SHOWN = 3


class TooLongError(UserError):
    """One row makes a sequence that the run cannot hold."""


@dataclass
class Tally:
    """How many, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < NUM_SHOWN:
            self.first.append(line)

    def lines(self, heading: str) -> list[str]:
        """The heading and the first few; nothing where there are none."""
        if not self.count:
            return []
        shown = "" if self.count <= len(self.first) else f"; the first {len(self.first)}"
        return [f"{heading.format(self.count)}{shown}:", *(f"  {line}" for line in self.first)]


@dataclass
class LoadReport:
    """What loading one split found; ``lines`` says all of it, ``key`` is its configuration key."""

    key: str
    num_rows: int = 0
    num_used: int = 0
    bad: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    chunked: Tally = field(default_factory=Tally)
    cache: str | None = None

    def lines(self) -> list[str]:
        """What a user must know, a line each; empty where every row was used as it is."""
        rows = f"of {self.num_rows} rows"
        return [
            *self.bad.lines(f"{self.key}: {{}} bad {rows} skipped (data.on_bad_row)"),
            *self.dropped.lines(f"{self.key}: {{}} {rows} dropped for their length (data.filter)"),
            *self.chunked.lines(f"{self.key}: {{}} {rows} cut into chunks of the longest sequence"),
            *([self.cache] if self.cache else []),
        ]

    def fail(self) -> UserError:
        """The error for bad rows: the first three, and how many there are."""
        more = [f"{self.key}: {self.bad.count} bad rows in all; data.on_bad_row: skip leaves them out"]
        return UserError("\n".join(self.bad.first + more * (self.bad.count > 1)))

    def to_json(self) -> dict[str, Any]:
        """For the cache, which keeps what was found with the tokens."""
        return asdict(self) | {"cache": None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LoadReport:
        """Inverse of to_json."""
        tallies = {name: Tally(**value[name]) for name in ("bad", "dropped", "chunked")}
        return cls(**(value | tallies))
