"""Blocking calls and Ray's answers on an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.cluster.ray_async import END, answer, in_thread, next_of, stream
from megarl.cluster.ray_runtime import start_ray, stop_ray

ROOT = Path(__file__).parents[2]


class Counts:
    def twice(self, number: int) -> int:
        if number < 0:
            raise KeyError("negative")
        return 2 * number

    def upto(self, number: int) -> Iterator[int]:
        for value in range(number):  # noqa: UP028 (Ray sends into its generators)
            yield value
        if number == 3:
            raise KeyError("three")

    def sleeps(self) -> None:
        time.sleep(30)


@pytest.fixture(scope="module")
def counts() -> Iterator[Any]:
    import ray

    # Workers do not search the driver's paths: they find this module by the environment.
    with pytest.MonkeyPatch.context() as patched:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        patched.setenv("PYTHONPATH", os.pathsep.join(paths))
        start_ray()
        actor: Any = ray.remote(Counts)
        yield actor.options(num_cpus=0, max_concurrency=4).remote()
        stop_ray()


async def taken(values: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in values]


def test_answers_and_streams_are_awaited(counts: Any) -> None:
    def started(number: int) -> Any:
        return counts.upto.options(num_returns="streaming").remote(number)

    async def run() -> None:
        assert await answer(counts.twice.remote(4)) == 8
        assert await taken(stream(started(2))) == [0, 1]
        last = started(0)
        assert await next_of(last) is END
        many = await asyncio.gather(*(taken(stream(started(n))) for n in (5, 9)))
        assert many == [list(range(5)), list(range(9))]

    asyncio.run(run())


def test_what_a_call_raises_is_raised_and_its_limit_held(counts: Any) -> None:
    async def run() -> None:
        with pytest.raises(KeyError, match="negative"):
            await answer(counts.twice.remote(-1))
        with pytest.raises(KeyError, match="three"):
            await taken(stream(counts.upto.options(num_returns="streaming").remote(3)))
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            await answer(counts.sleeps.remote(), timeout=0.2)
        assert time.monotonic() - start < 10

    asyncio.run(run())


def test_a_blocking_call_leaves_the_loop_free_and_its_thread_is_a_daemon() -> None:
    async def run() -> tuple[bool, int]:
        ticks, going = 0, asyncio.ensure_future(in_thread(slow))
        while not going.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await going, ticks

    def slow() -> bool:
        time.sleep(0.3)
        return threading.current_thread().daemon

    is_daemon, ticks = asyncio.run(run())
    assert is_daemon and ticks > 3

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(in_thread(fails))
