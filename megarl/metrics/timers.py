"""Wall time of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

Phase = Literal["rollout", "reward", "logprobs", "train", "weights", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimers:
    """Exclusive wall time per phase.

    ``with timers("train"):`` may be nested; an inner phase pauses the outer one, so that the phases of a step
    add up to its wall time. Time outside all phases is "other"; ``timers("other")`` excludes work inside a
    phase from it. Use one object per thread.

    Args:
        range_hook: wraps each phase, e.g. an NVTX range: ``hook(name)`` returns a context manager.
        start_hook: called when the first step of this process starts.
        clock: seconds from any origin, monotonic.
    """

    def __init__(
        self,
        range_hook: Callable[[str], AbstractContextManager[object]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        start_hook: Callable[[], None] = lambda: None,
    ) -> None:
        self.totals: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        """Seconds per phase over all ended steps of this process."""
        self.last_step: dict[str, float] = {}
        """Return value of the latest end_step."""
        self._range_hook = range_hook
        self._clock = clock
        self._start_hook = start_hook
        self._step: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._active: list[Phase] = []
        self._since = clock()

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``phase``."""
        assert phase in PHASES, f"{phase!r} is not one of {PHASES}"
        with nullcontext() if self._range_hook is None else self._range_hook(phase):
            self._book()
            self._active.append(phase)
            try:
                yield
            finally:
                self._book()
                self._active.pop()

    def move(self, source: Phase, target: Phase, seconds: float) -> None:
        """Move ``seconds`` of this step from phase ``source`` to ``target``."""
        self._book()
        self._step[source] -= seconds
        self._step[target] += seconds

    def start_step(self) -> None:
        """Discard the time since the last step ended (start-up, a pause)."""
        assert not self._active, f"step started inside phase {self._active[-1]!r}"
        self._start_hook()
        self._step = dict.fromkeys(PHASES, 0.0)
        self._since = self._clock()

    def end_step(self) -> dict[str, float]:
        """End the step and start the next; return its ``seconds`` and ``seconds_<phase>``."""
        assert not self._active, f"step ended inside phase {self._active[-1]!r}"
        self._book()
        step, self._step = self._step, dict.fromkeys(PHASES, 0.0)
        for phase in PHASES:
            self.totals[phase] += step[phase]
        self.last_step = {"seconds": sum(step.values())} | {f"seconds_{p}": step[p] for p in PHASES}
        return self.last_step

    def seconds(self, phase: Phase) -> float:
        """Return the seconds of ``phase`` in the current step so far."""
        self._book()
        return self._step[phase]

    def _book(self) -> None:
        now = self._clock()
        self._step[self._active[-1] if self._active else "other"] += now - self._since
        self._since = now
