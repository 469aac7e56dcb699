"""Await results of Ray calls on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

T = TypeVar("T")
END = object()
"""Returned by :func:`next_of` after the last value."""


async def answer(reference: Any, timeout: float | None = None) -> Any:
    """Await the value of a Ray reference.

    Raises TimeoutError after ``timeout`` seconds, else the error of the call (Ray's errors have ``cause``).
    """
    waiting = asyncio.wrap_future(reference.future())
    return await (waiting if timeout is None else asyncio.wait_for(waiting, timeout))


async def next_of(generator: Any) -> Any:
    """Await the next value of a call with ``num_returns="streaming"``; END after the last."""
    try:
        reference = await anext(generator)
    except StopAsyncIteration:
        return END
    return await answer(reference)


async def stream(generator: Any) -> AsyncIterator[Any]:
    """Yield all values of a call with ``num_returns="streaming"``, as they arrive."""
    while (value := await next_of(generator)) is not END:
        yield value


async def in_thread(call: Callable[[], T]) -> T:
    """Run a blocking ``call`` in a daemon thread; unlike asyncio's, it does not keep the process alive."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():  # cancelled
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed
            return

    threading.Thread(target=run, name="blocking call", daemon=True).start()
    return await done
