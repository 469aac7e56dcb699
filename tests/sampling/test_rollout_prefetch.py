"""Prefetching: the batches in flight, the order in which they are taken, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from megarl.sampling.rollout_prefetch import EventLoopThread, RolloutPrefetcher


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread()
    yield thread
    thread.close()


@pytest.mark.parametrize("staleness", [1, 2])
def test_batches_are_started_at_the_bound_and_taken_in_order(loop: EventLoopThread, staleness: int) -> None:
    version = 0
    started: dict[int, int] = {}

    async def sample(number: int) -> int:
        await asyncio.sleep(0.02 if number % 2 else 0.0)  # later batches finish first
        return number

    def draw(number: int) -> Coroutine[Any, Any, int]:
        started[number] = version  # what the engine would sample the first token with
        return sample(number)

    ahead = RolloutPrefetcher(loop, draw, first=4, last=9, max_staleness=staleness)
    version = 3
    for number in range(4, 10):
        assert ahead.take(number) == number
        assert ahead.in_flight == list(range(number + 1, min(number + staleness, 9) + 1))
        version = number
    # batch b starts with version b - 1 - k, the first ones with what there is
    assert started == {b: max(b - 1 - staleness, 3) for b in range(4, 10)}


def test_an_error_comes_out_where_its_batch_is_taken(loop: EventLoopThread) -> None:
    async def draw(number: int) -> int:
        if number == 2:
            raise TimeoutError("the environment hangs")
        return number

    ahead = RolloutPrefetcher(loop, draw, first=1, last=3, max_staleness=1)
    assert ahead.take(1) == 1
    with pytest.raises(TimeoutError, match="the environment hangs"):
        ahead.take(2)


def test_closing_cancels_what_runs() -> None:
    loop, ended = EventLoopThread(), []

    async def draw(number: int) -> int:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(number)
        return number

    running = [loop.start(draw(number)) for number in (1, 2, 3)]
    loop.run(asyncio.sleep(0))
    loop.close()
    assert sorted(ended) == [1, 2, 3] and all(future.cancelled() for future in running)
