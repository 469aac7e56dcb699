"""What a step tells tools/gpu_check.py: lines of its output, so that nothing measured is lost with it."""

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
    """This step cannot be run here; the text says why."""


@dataclass
class Report:
    """Figures and problems of one step, told as they are found."""

    out: Path
    wheels: Path | None = None
    quick: bool = False
    num_problems: int = field(default=0, init=False)

    def figure(self, name: str, value: Any) -> None:
        """A measured number, or several; the name ends with the unit."""
        self._tell({"figure": name, "value": _plain(value)})

    def summary(self, text: str) -> None:
        """The line of the table: what a reader wants to know first."""
        self._tell({"summary": text})

    def problem(self, text: str) -> None:
        """Something is wrong; the step has failed, and goes on."""
        self.num_problems += 1
        self._tell({"problem": text})

    def check(self, condition: bool, text: str) -> None:
        """``text`` is a problem unless ``condition``."""
        if not condition:
            self.problem(text)

    def _tell(self, message: dict[str, Any]) -> None:
        # A line of its own, whatever another process or library has written before.
        sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """As JSON has it: numbers to five digits, NaN and infinity by name."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
