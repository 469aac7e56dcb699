"""Awaitable requests on an engine's session, for concurrent episodes on one event loop."""

from __future__ import annotations

import asyncio
import time

from megarl.inference.interface import Engine, GeneratedResponse, GenerateRequest, SamplingConfig


class SessionClient:
    """``await client.generate(request)``; create and close it on the event loop that awaits.

    Requests of one pass over the event loop are submitted to the engine together, in order.
    """

    def __init__(self, engine: Engine, sampling: SamplingConfig) -> None:
        self._session = engine.session(sampling)
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[GeneratedResponse]] = {}
        self._outbox: list[GenerateRequest] = []
        self._error: Exception | None = None
        self._idle_since: float | None = None
        self._idle_seconds = 0.0
        self._reading = self._loop.create_task(self._read())

    def generate(self, request: GenerateRequest) -> asyncio.Future[GeneratedResponse]:
        """Sample one request. Raises the engine's exceptions."""
        future: asyncio.Future[GeneratedResponse] = self._loop.create_future()
        if self._error is not None:
            future.set_exception(self._error)
            return future
        if self._idle_since is not None:
            self._idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None
        assert request.request_id not in self._waiting, f"{request.request_id} is being sampled already"
        self._waiting[request.request_id] = future
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(request)
        return future

    def idle_seconds(self) -> float:
        """Return the wall time in which the engine was idle since its first request."""
        now = 0.0 if self._idle_since is None else time.perf_counter() - self._idle_since
        return self._idle_seconds + now

    def close(self) -> None:
        """End the session and abort unfinished requests."""
        self._session.close()
        self._reading.cancel()

    def _flush(self) -> None:
        requests, self._outbox = self._outbox, []
        try:
            self._session.submit(requests)
        except Exception as error:
            self._fail(error)

    async def _read(self) -> None:
        try:
            async for responses in self._session:
                for response in responses:
                    future = self._waiting.pop(response.request_id)
                    if not future.done():
                        future.set_result(response)
                if not self._waiting:
                    self._idle_since = time.perf_counter()
        except Exception as error:  # raised in the waiting episodes
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
