"""Report a step's results to tools/gpu_check.py as output lines, so nothing measured is lost with it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "@gpu_check "
EXIT_SKIPPED = 3


class SkipStep(Exception):
    """This step cannot run here; the text says why."""


@dataclass
class Report:
    """Figures and problems of one step, reported as they are found."""

    out: Path
    wheels: Path | None = None
    quick: bool = False
    num_problems: int = field(default=0, init=False)

    def figure(self, name: str, value: Any) -> None:
        """Report a measured number, or several; the name ends with the unit."""
        self._send({"figure": name, "value": _plain(value)})

    def summary(self, text: str) -> None:
        """Report the step's line of the table: the most important result."""
        self._send({"summary": text})

    def problem(self, text: str) -> None:
        """Report a problem; the step has failed, and continues."""
        self.num_problems += 1
        self._send({"problem": text})

    def check(self, condition: bool, text: str) -> None:
        """Report ``text`` as a problem unless ``condition`` holds."""
        if not condition:
            self.problem(text)

    def _send(self, message: dict[str, Any]) -> None:
        # A separate line, whatever another process or library has written before.
        sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Convert to JSON: numbers with five digits, NaN and infinity by name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
