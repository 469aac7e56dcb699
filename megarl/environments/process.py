"""A worker process and its successors: Ray actors with time limits, replaced when they die or hang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from megarl.cluster.ray_async import END, answer, next_of
from megarl.cluster.ray_runtime import with_variables
from megarl.cluster.variables import environment_worker_variables
from megarl.environments.worker import GATHER_SECONDS, EnvironmentFacts

if TYPE_CHECKING:
    from megarl.config.environments import EnvironmentRuntime

log = logging.getLogger(__name__)
T = TypeVar("T")

# A call that only waits is ended by the actor itself at its limit; one that computes, by us, this much later.
_GRACE_SECONDS = 2.0


class EnvironmentFailureError(RuntimeError):
    """An environment did not answer. ``blameless``: another episode took its process down."""

    explains_itself = True

    def __init__(self, reason: str, *, blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless


class ProcessEndedError(EnvironmentFailureError):
    """The process died, or was ended because it gave no answer."""


class WorkerProcess:
    """One actor at a time; ``generation`` counts them.

    Args:
        actor_class: the actor's, by ray.remote.
        arguments: its own.
        field: the environment's configuration key, for messages.
        runtime: the limits.
    """

    def __init__(
        self, actor_class: Any, arguments: tuple[Any, ...], field: str, runtime: EnvironmentRuntime
    ) -> None:
        self._actor_class, self._arguments = actor_class, arguments
        self._field, self._runtime = field, runtime
        self.generation = -1
        self.num_replaced = 0
        self.num_episodes = 0
        """Open episodes of several turns."""
        self.num_answers = 0
        """Answers that it was given to judge."""
        self.facts: EnvironmentFacts | None = None
        self.slots = asyncio.Semaphore(1)
        """Of calls of several turns."""
        self._spawn()

    def enter_loop(self) -> None:
        """Serve the running event loop; whatever another one waited for is forgotten."""
        self.num_episodes = self.num_answers = 0
        self.slots = asyncio.Semaphore(1 if self.facts is None else self.facts.max_concurrency)

    async def ready(self) -> None:
        """Wait for a successor's start. Raises EnvironmentFailureError."""
        if self.facts is None:
            reference, limit = self.actor.facts.remote(), self._runtime.start_timeout_seconds
            late = f"not started within {limit:g} s"
            self.facts = await self._within(self.generation, answer(reference), limit, late)

    async def call(self, generation: int, method: str, *arguments: Any) -> Any:
        """Return the answer of this generation's actor; raise EnvironmentFailureError."""
        reference = getattr(self.actor, method).remote(*arguments)
        return await self._within(generation, answer(reference), self._limit)

    async def stream(self, generation: int, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """Yield the results of this generation's actor; raise EnvironmentFailureError."""
        pieces = getattr(self.actor, method).options(num_returns="streaming").remote(*arguments)
        while True:
            piece = await self._within(generation, next_of(pieces), self._limit)
            if piece is END:
                return
            yield piece

    def kill(self) -> None:
        """End the process."""
        import ray

        ray.kill(self.actor, no_restart=True)

    @property
    def _limit(self) -> float:
        return self._runtime.timeout_seconds + GATHER_SECONDS + _GRACE_SECONDS

    def _spawn(self) -> None:
        self.generation += 1
        self.facts = None
        options = with_variables(environment_worker_variables())
        self.actor: Any = self._actor_class.options(
            num_cpus=0,
            max_restarts=0,
            enable_task_events=False,  # the GCS would keep every call
            **options,
        ).remote(*self._arguments)

    async def _within(self, generation: int, waiting: Awaitable[T], limit: float, late: str = "") -> T:
        from ray.exceptions import RayActorError

        try:
            return await asyncio.wait_for(waiting, limit)
        except TimeoutError as error:
            # The environment's own TimeoutError arrives here too: its process is well then.
            if getattr(error, "cause", None) is not None:
                raise EnvironmentFailureError(words(error)) from error
            # With several calls at a time, those beside the one that blocks are not told apart from it.
            late = late or f"no answer within {self._runtime.timeout_seconds:g} s"
            reason = f"{late}; its process was ended"
        except RayActorError as error:
            alone = self.facts is None or self.facts.max_concurrency == 1
            if generation != self.generation and not alone:
                raise ProcessEndedError("its process was replaced", blameless=True) from error
            reason = f"its process died: {words(error)}"
        except Exception as error:
            raise EnvironmentFailureError(words(error)) from error
        if generation == self.generation:
            self.num_replaced += 1
            log.warning("%s: environment process replaced: %s", self._field, reason)
            self.kill()
            self._spawn()
        raise ProcessEndedError(reason)


def words(error: BaseException) -> str:
    """An error of Ray's, or what caused it, in one line."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    name = type(cause).__name__
    return text[:300] if name.startswith("Ray") or "Actor" in name else f"{name}: {text[:300]}"
