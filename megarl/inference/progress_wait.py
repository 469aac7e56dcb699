"""Wait for slow operations as long as they make progress."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DIGITS = re.compile(r"\d+")


def wait_while_progressing(
    is_done: Callable[[float], bool],
    progress: Callable[[float], Any],
    patience: float,
    *,
    interval: float = 5.0,
) -> bool:
    """Return True if ``is_done`` became true before ``patience`` seconds passed without progress.

    Args:
        is_done: waits up to the given number of seconds.
        progress: returns a value that changes with every progress; None, or no answer within the given number
            of
            seconds, counts as no progress.
        patience: seconds allowed for each step of progress.
        interval: seconds between two checks.
    """
    seen, deadline = None, time.monotonic() + patience
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        if is_done(min(interval, left)):
            return True
        now = progress(min(interval, left))
        if now is not None and now != seen:
            seen, deadline = now, time.monotonic() + patience
        elif time.monotonic() >= deadline:
            return is_done(0.0)


def kinds_of_lines(log: Path) -> int:
    """Count lines of a log that differ in more than numbers: a hanging process repeats one kind of line."""
    if not log.exists():
        return 0
    return len({_DIGITS.sub("", line) for line in log.read_text(errors="replace").splitlines()})
