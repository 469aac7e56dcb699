"""Drive an engine's session from a test that is not a coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig


def generate(
    engine: Any, requests: Sequence[GenerateRequest], sampling: SamplingConfig
) -> Iterator[GeneratedResponse]:
    """Sample all requests in a session of their own; each response when it has finished.

    Bad requests raise at once, before anything is iterated. A consumer that leaves ends the session.
    """
    session = engine.session(sampling)
    session.submit(requests)
    return _responses(session, len(requests))


def _responses(session: Any, count: int) -> Iterator[GeneratedResponse]:
    with asyncio.Runner() as runner:
        steps = aiter(session)

        async def take() -> list[GeneratedResponse]:
            return await anext(steps)

        try:
            while count:
                for response in runner.run(take()):
                    count -= 1
                    yield response
        finally:
            session.close()
            runner.run(steps.aclose())
