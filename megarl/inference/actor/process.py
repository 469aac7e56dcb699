"""The actor process of an engine and its successors: start, calls, failure and replacement."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl import platform
from megarl.cluster.ray_runtime import beside_ranks, unlink_on_node
from megarl.cluster.variables import engine_variables
from megarl.errors import UserError, see
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.interface import EngineError, WeightPlanError
from megarl.inference.placement import EnginePlace, threads_per_rank
from megarl.inference.progress_wait import wait_while_progressing

log = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3
_LOG_TAIL_LINES = 25
_LOG_LINE_WIDTH = 300  # vLLM prints its whole configuration in one line
# Calls that only wait (stream, wait_started) hold one of the actor's threads each.
_ACTOR_THREADS = 16

Call = Callable[..., Any]
"""``call(method, *arguments)`` of an actor."""


class EngineProcess:
    """One actor at a time; a dead one is replaced. MAX_DEATHS_IN_A_ROW deaths without an answer are an error.

    Args:
        name: of the engine, in messages.
        actor_class: the body of the actor, made of the settings and the log's path.
        settings: for building the engine.
        log_path: receives everything the actor prints.
        place: the node, the devices and the cores.
        restore: gives a successor the state of its predecessor through calls; may raise as calls do.
    """

    def __init__(
        self,
        name: str,
        actor_class: Callable[[EngineSettings, str], Any],
        settings: EngineSettings,
        log_path: Path,
        place: EnginePlace,
        restore: Callable[[Call], None],
    ) -> None:
        self._name, self._actor_class = name, actor_class
        self._settings, self._place, self._restore = settings, place, restore
        self.log_path = log_path
        self.actor: Any
        """The present one."""
        self._deaths_in_a_row = 0
        self._has_started = False
        self._replacing = threading.Lock()
        self._shared_memory: list[str] = []
        self._spawn()

    def wait_started(self) -> None:
        """Wait for the actor's start, which can take minutes on a cold, busy host.

        Raises:
            EngineError: no progress for start_timeout_seconds.
            ray.exceptions.RayActorError: the actor died.
        """
        patience = self._settings.config.start_timeout_seconds

        def started(seconds: float) -> bool:
            try:
                self._shared_memory = self.value(self._started, timeout=seconds)
            except TimeoutError:
                return False
            return True

        def progress(seconds: float) -> Any:
            try:
                return self.value(self.actor.progress.remote(), timeout=seconds)
            except TimeoutError:
                return None

        if not wait_while_progressing(started, progress, patience):
            message = (
                f"the {self._name} engine was not ready and made no progress for {patience:g} s "
                f"(rollout.engine.start_timeout_seconds); its last words: {self._last_line()}"
                f"{see('engine-dies')}"
            )
            raise EngineError(self.explain(message))

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the actor; if it dies, retry once on its successor."""
        while True:
            actor = self.actor
            try:
                return self.value(getattr(actor, method).remote(*arguments))
            except actor_died() as death:
                self.replace(death, f"{method} is called again", actor)

    def value(self, reference: Any, timeout: float | None = None) -> Any:
        """Return the value of a Ray reference. Raises TimeoutError, or :meth:`translated` errors."""
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            return ray.get(reference, timeout=timeout)
        except GetTimeoutError:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        except task_failed() as error:
            raise self.translated(error) from error

    def translated(self, error: Any) -> Exception:
        """Translate an exception raised in the actor: keep a UserError, turn others into EngineError."""
        if isinstance(error.cause, UserError | WeightPlanError | AssertionError):
            return error.cause
        return EngineError(self.explain(f"the {self._name} engine failed: {error.cause!r}"))

    def explain(self, message: str) -> str:
        """Append the end of the engine's log to ``message``."""
        tail = "\n".join(f"  | {line[:_LOG_LINE_WIDTH]}" for line in self._log_lines()[-_LOG_TAIL_LINES:])
        return f"{message}\nEnd of {self.log_path}:\n{tail or '  | (empty)'}"

    def _log_lines(self) -> list[str]:
        return self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []

    def _last_line(self) -> str:
        said = [line.strip() for line in self._log_lines() if line.strip()]
        return said[-1][:_LOG_LINE_WIDTH] if said else "none, its log is empty"

    def answered(self) -> None:
        """Record that the actor works: the count of deaths starts again."""
        self._deaths_in_a_row = 0
        self._has_started = True

    def replace(self, death: Exception, then: str, dead: Any) -> None:
        """Start a successor and restore it, or raise EngineError. Blocks.

        If several threads see the same death, all but one find ``dead`` already replaced.
        """
        with self._replacing:
            if self.actor is dead:
                self._start_successor(death, then)

    def kill(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self.actor, no_restart=True)
        # Remove its workers' message queues, which killed processes leave behind.
        unlink_on_node(self._shared_memory, self._place.node)
        self._shared_memory = []

    def _spawn(self) -> None:
        import ray

        config = self._settings.config
        threads = threads_per_rank(config, self._place)
        invariant = config.batch_invariant and platform.chosen_name() == "cuda"
        variables = engine_variables(threads, batch_invariant=invariant)
        actor_class: Any = ray.remote(self._actor_class)
        self.actor = actor_class.options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=_ACTOR_THREADS,
            enable_task_events=False,  # otherwise the GCS keeps every call
            **beside_ranks(self._place.node, self._place.devices, variables),
        ).remote(self._settings, str(self.log_path))
        self._started: Any = self.actor.wait_started.remote()

    def _start_successor(self, death: Exception, then: str) -> None:
        while True:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
                times = f"{MAX_DEATHS_IN_A_ROW} times in a row"
                when = "" if self._has_started else " while starting,"
                message = f"the {self._name} engine died{when} {times}; last cause: {_cause(death)}"
                message += see("engine-dies")
                raise EngineError(self.explain(message)) from death
            log.warning("The %s engine died (%s). Restarting it; %s.", self._name, _cause(death), then)
            self.kill()  # the actor may be unreachable rather than dead
            self._spawn()
            try:
                self.wait_started()
                self._restore(lambda method, *args: self.value(getattr(self.actor, method).remote(*args)))
                return
            except actor_died() as next_death:
                death = next_death


def actor_died() -> type[Exception]:
    """Return the exception type of a call whose actor is gone."""
    from ray.exceptions import RayActorError

    return RayActorError


def task_failed() -> type[Exception]:
    """Return the exception type of a call that raised in the actor."""
    from ray.exceptions import RayTaskError

    return RayTaskError


def _cause(death: Exception) -> str:
    """Extract the cause from Ray's description, in one line."""
    text = " ".join(str(death).split())
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    pid = re.search(r"pid: (\d+)", text)
    return (f"pid {pid[1]}: " if pid else "") + (detail[1] if detail else text)[:300]
