"""The driver's side of a session: requests that come while others are being decoded."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megarl.rollout.engine import GeneratedResponse, GenerateRequest, SamplingConfig

if TYPE_CHECKING:
    from megarl.rollout.vllm_engine import VllmEngine


class VllmSession:
    """An :class:`megarl.rollout.engine.EngineSession`; unfinished requests outlive the actor."""

    def __init__(self, engine: VllmEngine, sampling: SamplingConfig) -> None:
        self._engine, self._sampling = engine, sampling
        self._id = uuid.uuid4().hex
        self._unfinished: dict[str, GenerateRequest] = {}
        self._closed = False
        self._lock = threading.Lock()  # a successor must get each request once
        self._stream = self._open()

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """See EngineSession.submit. Raises ValueError as generate does."""
        self._engine.check_requests(requests)
        with self._lock:
            self._unfinished.update((request.request_id, request) for request in requests)
            # To the actor of the stream: if it is dead, they go to its successor with all that is unfinished.
            self._actor.submit.remote(self._id, list(requests), self._sampling)

    def __iter__(self) -> Iterator[GeneratedResponse]:
        while True:
            try:
                for finished in self._stream:
                    for response in self._engine._get(finished):
                        with self._lock:
                            if self._unfinished.pop(response.request_id, None) is None:
                                continue
                            self._engine._deaths_in_a_row = 0
                        yield response
                return
            except actor_died() as death:
                with self._lock:
                    if self._closed:
                        return
                    then = f"{len(self._unfinished)} unfinished requests are sampled again"
                    self._engine._replace(death, then, self._actor)
                    self._stream = self._open()
                    self._actor.submit.remote(self._id, list(self._unfinished.values()), self._sampling)

    def close(self) -> None:
        """See EngineSession.close."""
        with self._lock:
            self._closed = True
            self._unfinished.clear()
            self._actor.end_session.remote(self._id)

    def _open(self) -> Any:
        self._actor: Any = self._engine._actor
        return self._actor.stream.options(num_returns="streaming").remote(self._id)


def actor_died() -> type[Exception]:
    """What a call raises whose actor is gone."""
    from ray.exceptions import RayActorError

    return RayActorError
