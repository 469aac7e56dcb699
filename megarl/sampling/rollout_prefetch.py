"""Rollouts that run ahead of training, on an event loop of their own (rank 0 only).

Batches are drawn and trained on in the order of their prompts, never in the order in which they finish: what
finishes first is short, and learning from it first would favour short answers. Batch b is started when the
engine has version b - 1 - k, so that no token is older than k updates when it is learned from.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """An event loop in a thread: what several threads ask for runs side by side."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run in the background."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run and wait."""
        return self.start(work).result()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""

        async def cancel() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        try:
            self.start(cancel()).result(timeout=10)
        except concurrent.futures.TimeoutError:  # it hangs in a call: the thread ends with the process
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


class RolloutPrefetcher(Generic[T]):
    """Batches by number, of which up to ``max_staleness`` beyond the one that is asked for are under way.

    Args:
        loop: where they run.
        draw: starts batch number b; called in ascending order.
        first: the first batch that will be taken.
        last: the last batch there is.
        max_staleness: k.
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
        """Numbers of the batches that were started and not taken."""
        return sorted(self._started)

    def take(self, number: int, wait: Callable[[], None] = lambda: None) -> T:
        """Batch ``number``, when it is complete; starts those that may be started now.

        ``wait`` is called now and then meanwhile. Raises what drawing it raised.
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
                if future.done():  # the batch itself ran into a time limit
                    raise
                continue
            del self._started[number]
            return result
