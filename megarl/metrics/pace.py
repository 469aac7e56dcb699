"""Pace of a run: the time left, and which steps get a line on the console."""

from __future__ import annotations

import time
from collections import deque

_WINDOW = 50  # steps over which the pace is measured
LINE_SECONDS = 10.0
"""Longest time between two lines, where logging.interval leaves the choice."""


class Pace:
    """The steps of one process's part of a run.

    Args:
        total: the last step.
        done: the step that the run goes on after.
        interval: steps per line; None: about 1% of ``total``, or as many as take :data:`LINE_SECONDS`.
    """

    def __init__(self, total: int, done: int, interval: int | None) -> None:
        self._total, self._first, self._interval = total, done, interval
        self._times: deque[tuple[int, float]] = deque([(done, time.monotonic())], maxlen=_WINDOW)
        self._last_line = -LINE_SECONDS

    def advance(self, step: int, *, is_evaluated: bool = False) -> bool:
        """Count ``step`` as done; return whether it gets a line."""
        now = time.monotonic()
        if step > self._times[-1][0]:  # an evaluation before training is no step
            self._times.append((step, now))
        interval = self._interval or max(1, round(self._total / 100))
        due = step % interval == 0 or step in (self._first + 1, self._total) or is_evaluated
        if not due and (self._interval is not None or now - self._last_line < LINE_SECONDS):
            return False
        self._last_line = now
        return True

    def time_left(self) -> str | None:
        """Return the time to the last step at the recent pace, as 1:05 or 2:03:10; None before a step."""
        (first, began), (last, ended) = self._times[0], self._times[-1]
        if last == first:
            return None
        seconds = round((self._total - last) * (ended - began) / (last - first))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
