"""The driver's side of a session: requests submitted while others are being decoded."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from megarl.cluster.ray_async import in_thread, stream
from megarl.inference.actor.process import EngineProcess, actor_died, task_failed
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig, check_requests


class ActorSession:
    """An :class:`megarl.inference.interface.EngineSession`; unfinished requests survive the actor's death."""

    def __init__(self, process: EngineProcess, sampling: SamplingConfig, max_model_len: int) -> None:
        self._process, self._sampling, self._max_model_len = process, sampling, max_model_len
        self._id = uuid.uuid4().hex
        self._unfinished: dict[str, GenerateRequest] = {}
        self._closed = False
        self._stream = self._open()

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """See EngineSession.submit."""
        check_requests(requests, self._max_model_len)
        self._unfinished.update((request.request_id, request) for request in requests)
        # To the stream's actor: if it is dead, its successor gets them with all other unfinished requests.
        self._actor.submit.remote(self._id, list(requests), self._sampling)

    async def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        while True:
            try:
                async for responses in stream(self._stream):
                    # An actor that was declared dead may still answer.
                    fresh = [r for r in responses if self._unfinished.pop(r.request_id, None) is not None]
                    if fresh:
                        self._process.answered()
                        yield [_copied(response) for response in fresh]
                return
            except actor_died() as death:
                if self._closed or not await self._move(death):
                    return
            except task_failed() as error:
                raise self._process.translated(error) from error

    def close(self) -> None:
        """See EngineSession.close."""
        self._closed = True
        self._unfinished.clear()
        self._actor.end_session.remote(self._id)

    async def _move(self, death: Exception) -> bool:
        """Continue on the successor of the dead actor; False if the session was closed meanwhile."""
        then = f"{len(self._unfinished)} unfinished requests are sampled again"
        await in_thread(lambda: self._process.replace(death, then, self._actor))
        if self._closed:
            return False
        self._stream = self._open()
        self._actor.submit.remote(self._id, list(self._unfinished.values()), self._sampling)
        return True

    def _open(self) -> Any:
        self._actor: Any = self._process.actor
        return self._actor.stream.options(num_returns="streaming").remote(self._id)


def _copied(response: GeneratedResponse) -> GeneratedResponse:
    """Copy the arrays: those from Ray are views of its object store, which they would keep full."""
    return replace(
        response,
        token_ids=response.token_ids.copy(),
        logprobs=response.logprobs.copy(),
        experts=None if response.experts is None else response.experts.copy(),
    )
