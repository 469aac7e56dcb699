"""The engine's side: an actor process with one thread that runs the engine, implemented by a backend."""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megarl.cluster.processes import own_shared_memory
from megarl.cluster.ray_runtime import make_temp_dir
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.interface import (
    AttachReport,
    EngineHealth,
    EngineMemory,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    SyncReport,
)
from megarl.inference.progress_wait import kinds_of_lines
from megarl.models.table import Region
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan

ResponseQueue = queue.SimpleQueue["list[GeneratedResponse] | BaseException | None"]


class EngineActor(ABC):
    """Body of the Ray actor. Ray calls its methods on several threads; all work except waiting is done
    on one engine thread, between decoding steps, so no call sees a half-finished step.

    A backend implements the abstract methods and calls no others; all of them run on the engine thread.
    """

    def __init__(self, settings: EngineSettings, log_path: str) -> None:
        _redirect_output(log_path)
        # The driver's directory, unless this is another host.
        temp_dir = settings.temp_dir
        if not os.path.isdir(temp_dir):
            folder, self._temp_dir_lock = make_temp_dir()
            temp_dir = str(folder)
        # Variables that are read once are set before this process starts (megarl.cluster.variables).
        os.environ["TMPDIR"] = tempfile.tempdir = temp_dir
        self._settings, self._log_path = settings, Path(log_path)
        self._started: Future[None] = Future()
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._requests: dict[str, ResponseQueue] = {}  # unfinished, by id
        self._sessions: dict[str, ResponseQueue] = {}  # open, by id
        self._policy_version: int | None = None
        self._paused = False
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # ---- called by the driver, on Ray's threads ----

    def wait_started(self) -> list[str]:
        """Wait until the engine is built, or raise its error; return its processes' shared memory."""
        self._started.result()
        return sorted({*own_shared_memory(), *self._on_engine_thread(self._shared_memory)})

    def progress(self) -> tuple[int, int]:
        """Return counters that grow while the engine starts: imported modules, and kinds of log lines."""
        return len(sys.modules), kinds_of_lines(self._log_path)

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """See Engine.describe_parameters."""
        return self._on_engine_thread(self._describe_parameters)

    def regions(self, names: list[str]) -> list[Region] | None:
        """See Engine.regions."""
        return self._on_engine_thread(lambda: self._regions(names))

    def sleep(self) -> None:
        """See Engine.sleep."""
        self._on_engine_thread(self._sleep)

    def wake(self) -> None:
        """See Engine.wake."""
        self._on_engine_thread(self._wake)

    def places(self) -> list[tuple[str, str]]:
        """See Engine.places."""
        return self._on_engine_thread(self._places)

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """See Engine.attach."""
        return self._on_engine_thread(lambda: self._attach(plans))

    def sync(self, policy_version: int) -> SyncReport:
        """See Engine.sync."""
        return self._on_engine_thread(lambda: self._timed_sync(policy_version))

    def checksums(self) -> list[list[RegionChecksum]]:
        """See Engine.checksums."""
        return self._on_engine_thread(self._checksums)

    def stream(self, session: str) -> Iterator[list[GeneratedResponse]]:
        """Stream the finished requests of ``session`` until it is ended.

        Requests that finish in one decoding step come together.
        """
        responses = self._session(session)
        while (finished := responses.get()) is not None:
            if isinstance(finished, BaseException):
                raise finished
            yield finished

    def submit(self, session: str, requests: list[GenerateRequest], sampling: SamplingConfig) -> None:
        """Add requests to a session; its stream raises any error about them."""
        responses = self._session(session)
        try:
            self._on_engine_thread(lambda: self._admit(requests, sampling, responses))
        except BaseException as error:
            responses.put(error)

    def end_session(self, session: str) -> None:
        """Abort unfinished requests and end the stream."""
        responses = self._session(session)
        unfinished = [name for name, owner in self._requests.copy().items() if owner is responses]
        self._on_engine_thread(lambda: self._end(unfinished))
        responses.put(None)
        del self._sessions[session]

    def _session(self, session: str) -> ResponseQueue:
        # Ray's threads may run submit before stream; setdefault is atomic.
        return self._sessions.setdefault(session, queue.SimpleQueue())

    def abort(self, request_ids: list[str]) -> None:
        """See Engine.abort."""
        self._on_engine_thread(lambda: self._end(request_ids))

    def set_paused(self, paused: bool) -> None:
        """See Engine.pause and Engine.resume."""
        self._on_engine_thread(lambda: setattr(self, "_paused", paused))

    def health(self) -> EngineHealth:
        """See Engine.health; answers during a step too."""
        return EngineHealth(os.getpid(), self._policy_version, len(self._requests), self._paused)

    # ---- implemented by the backend, on the engine thread ----

    @abstractmethod
    def _build(self) -> None:
        """Build the engine; UserError for errors that the user can fix."""

    @abstractmethod
    def _step(self) -> list[GeneratedResponse]:
        """Run one decoding step; return the finished responses."""

    @abstractmethod
    def _add(self, request: GenerateRequest, sampling: SamplingConfig) -> None:
        """Decode a request from the next step on."""

    @abstractmethod
    def _abort(self, request_ids: set[str]) -> list[GeneratedResponse]:
        """Abort these unfinished requests; return their responses so far."""

    @abstractmethod
    def _describe_parameters(self) -> list[dict[str, ParamInfo]]: ...

    @abstractmethod
    def _places(self) -> list[tuple[str, str]]: ...

    @abstractmethod
    def _attach(self, plans: list[WeightPlan]) -> list[AttachReport]: ...

    @abstractmethod
    def _sync(self, policy_version: int) -> int:
        """Sync the weights and drop stale caches; return the bytes written."""

    @abstractmethod
    def _memory(self) -> list[EngineMemory]:
        """Return the memory of every engine rank, that of this process included."""

    @abstractmethod
    def _checksums(self) -> list[list[RegionChecksum]]: ...

    @abstractmethod
    def _sleep(self) -> None: ...

    @abstractmethod
    def _wake(self) -> None: ...

    def _regions(self, names: list[str]) -> list[Region] | None:
        return None

    def _shared_memory(self) -> Iterable[str]:
        """Return the names of the shared memory of worker processes."""
        return ()

    def _look_into(self, error: BaseException) -> None:  # noqa: B027 - most have nothing to do
        """Inspect an error of a step or a call before it is raised; may end the process instead."""

    # ---- the engine thread ----

    def _run(self) -> None:
        try:
            self._build()
        except BaseException as error:
            traceback.print_exc()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while True:
                decoding = bool(self._requests) and not self._paused
                self._run_commands(wait=not decoding)
                if self._requests and not self._paused:
                    self._deliver(self._step())
        except BaseException as error:
            self._look_into(error)
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Fail every call with the cause: a decoding step failed and left the engine in an unknown state."""
        traceback.print_exception(error)
        for responses in set(self._requests.values()):
            responses.put(error)
        while True:
            self._commands.get()[1].set_exception(error)

    def _on_engine_thread(self, command: Callable[[], Any]) -> Any:
        self._started.result()
        done: Future[Any] = Future()
        self._commands.put((command, done))
        return done.result()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the queued commands; with ``wait``, block until there is one."""
        while wait or not self._commands.empty():
            wait = False
            command, done = self._commands.get()
            try:
                done.set_result(command())
            except BaseException as error:
                self._look_into(error)
                done.set_exception(error)

    def _timed_sync(self, policy_version: int) -> SyncReport:
        start = time.perf_counter()
        bytes_moved = self._sync(policy_version)
        self._policy_version = policy_version
        seconds = time.perf_counter() - start
        return SyncReport(bytes_moved, seconds, sum(self._memory(), EngineMemory()))

    def _admit(
        self, requests: list[GenerateRequest], sampling: SamplingConfig, responses: ResponseQueue
    ) -> None:
        assert self._policy_version is not None, "generate before the first sync: the engine has no weights"
        duplicates = self._requests.keys() & {r.request_id for r in requests}
        assert not duplicates, f"request ids already in use: {sorted(duplicates)}"
        for request in requests:
            self._add(request, sampling)
            self._requests[request.request_id] = responses

    def _end(self, request_ids: Iterable[str]) -> None:
        self._deliver(self._abort(self._requests.keys() & set(request_ids)))

    def _deliver(self, finished: list[GeneratedResponse]) -> None:
        by_caller: dict[ResponseQueue, list[GeneratedResponse]] = {}
        for response in finished:
            by_caller.setdefault(self._requests.pop(response.request_id), []).append(response)
        for caller, responses in by_caller.items():
            caller.put(responses)


def _redirect_output(log_path: str) -> None:
    """Redirect everything this process prints, from C++ too, to one file."""
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Ray may have replaced the standard streams.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
