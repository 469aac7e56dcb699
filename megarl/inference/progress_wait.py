"""Waiting for what may take long, as long as it gets on."""

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
    """Whether ``is_done`` came true before ``patience`` seconds had passed without progress.

    Args:
        is_done: waits up to so many seconds.
        progress: whatever changes with every sign of it; None, or an answer that takes more than so many
            seconds, is none.
        patience: seconds, for each step of progress.
        interval: seconds between two looks.
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
    """Lines of a log that differ in more than numbers: what a hanging process says again and again is one."""
    if not log.exists():
        return 0
    return len({_DIGITS.sub("", line) for line in log.read_text(errors="replace").splitlines()})
