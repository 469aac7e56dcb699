"""When the phases of a step began and ended on this rank, for the report's timeline.

:func:`megarl.platform.ranges.phase` records a span per range; :func:`span` records one that is no range, such
as a wait for other ranks. Only the main thread records. On a GPU both ends are CUDA events, so a
span covers its kernels, not their launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

WAIT = "wait"
"""Name of spans in which this rank waits for other ranks."""
REDUCTION = "gradient_reduction"
"""Name of spans in which gradients are exchanged, the wait for a slower rank included."""
_SHORTEST = 1e-3  # of the step: too short to be drawn


@dataclass(frozen=True, slots=True)
class Span:
    """One phase: ``begin`` and ``end`` in seconds since the step began, ``depth`` the enclosing phases."""

    depth: int
    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class StepSpans:
    """The spans of a step, in order of ``begin``; ``start`` is its beginning in Unix time."""

    start: float
    seconds: float
    spans: list[Span]

    def row(self) -> dict[str, Any]:
        """Return it as :mod:`megarl.metrics.timeline` writes it, to 10 microseconds."""
        spans = [[s.depth, s.name, round(s.begin, 5), round(s.end, 5)] for s in self.spans]
        return {"start": round(self.start, 4), "seconds": round(self.seconds, 5), "spans": spans}


@dataclass(slots=True)
class _Mark:
    seconds: float
    event: torch.cuda.Event | None


class Recorder:
    """Records spans between :meth:`start` and :meth:`take`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: list[tuple[str, _Mark, int]] = []  # the last is a number of its own
        self._found: list[tuple[int, int, str, _Mark, _Mark]] = []  # depth, number of the enclosing one
        self._count = 0
        self.start()

    def start(self) -> None:
        """Begin a step; spans that are open go on into it."""
        self._start, self._origin = time.time(), self._mark()
        self._found = []
        self._open = [(name, self._origin, number) for name, _, number in self._open]

    def begin(self, name: str) -> None:
        """Open a span inside those that are open."""
        self._count += 1
        self._open.append((name, self._mark(), self._count))

    def end(self) -> None:
        """Close the innermost span."""
        name, begin, _ = self._open.pop()
        inside = self._open[-1][2] if self._open else 0
        self._found.append((len(self._open), inside, name, begin, self._mark()))

    def take(self) -> StepSpans:
        """End the step and begin the next; return its spans.

        Spans of one name that touch, inside one span, are one; what is shorter than a thousandth of the step
        is left out.
        """
        last = self._mark()
        start, seconds = self._start, self._at(last)
        found = [(inside, Span(d, name, self._at(a), self._at(b))) for d, inside, name, a, b in self._found]
        self.start()
        shortest = _SHORTEST * seconds
        merged: dict[int, list[Span]] = {}
        for inside, span in sorted(found, key=lambda each: each[1].begin):
            row = merged.setdefault(inside, [])
            if row and row[-1].name == span.name and span.begin - row[-1].end < shortest:
                row[-1] = Span(span.depth, span.name, row[-1].begin, span.end)
            else:
                row.append(span)
        kept = [span for row in merged.values() for span in row if span.end - span.begin >= shortest]
        return StepSpans(start, seconds, sorted(kept, key=lambda each: (each.begin, each.depth)))

    def _mark(self) -> _Mark:
        event = None
        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return _Mark(self._clock(), event)

    def _at(self, mark: _Mark) -> float:
        """Return seconds since the step began: on the GPU's clock, if the step began on it."""
        origin = self._origin
        if origin.event is None or mark.event is None:
            return mark.seconds - origin.seconds
        mark.event.synchronize()
        return float(origin.event.elapsed_time(mark.event)) / 1e3


_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """Record spans with ``recorder`` from now on; None: no longer."""
    global _recorder
    _recorder = recorder


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the time inside the ``with`` block as ``name``, if spans are recorded."""
    recorder = _recorder
    if recorder is None:
        yield
        return
    recorder.begin(name)
    try:
        yield
    finally:
        recorder.end()
