"""Asynchronous rollouts: batches prefetched during training, on a separate event loop (rank 0 only).

Batches are drawn and trained on in prompt order, never in order of completion: what finishes first is short,
and training on it first would favour short answers. Batch b starts when the engine has version b - 1 - k, so
no token is more than k updates old when it is trained on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """An event loop in a background thread, shared by the callers of several threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``work`` in the background."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` and wait for its result."""
        return self.start(work).result()

    def close(self) -> None:
        """Cancel running work and end the thread."""

        async def cancel() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        try:
            self.start(cancel()).result(timeout=10)
        except concurrent.futures.TimeoutError:  # stuck in a call: the thread ends with the process
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class RolloutPrefetcher(Generic[T]):
    """Batches by number; up to ``max_staleness`` beyond the requested one are in flight.

    Args:
        loop: runs the batches.
        draw: starts batch number b; called in ascending order.
        first: the first batch to be taken.
        last: the last batch of the run.
        max_staleness: k, in steps.
    """

    def __init__(
        self,
        loop: EventLoopThread,
        draw: Callable[[int], Coroutine[Any, Any, T]],
        *,
        first: int,
        last: int,
        max_staleness: int,
    ) -> None:
        self._loop, self._draw, self._last, self._ahead = loop, draw, last, max_staleness
        self._next = first
        self._started: dict[int, concurrent.futures.Future[T]] = {}

    @property
    def in_flight(self) -> list[int]:
        """Return the numbers of the batches that were started and not yet taken."""
        return sorted(self._started)

    def take(self, number: int, wait: Callable[[], None] = lambda: None) -> T:
        """Return batch ``number`` once it is complete; start the batches that may start now.

        ``wait`` is called regularly while waiting. Re-raises the exception that drawing the batch raised.
        """
        while self._next <= min(number + self._ahead, self._last):
            self._started[self._next] = self._loop.start(self._draw(self._next))
            self._next += 1
        future = self._started[number]
        while True:
            wait()
            try:
                result = future.result(timeout=0.2)
            except concurrent.futures.TimeoutError:
                if future.done():  # the timeout is the batch's own, not that of this wait
                    raise
                continue
            del self._started[number]
            return result
