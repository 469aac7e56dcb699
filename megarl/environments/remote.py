"""Environments in processes of their own: Ray actors, with time limits, replaced when they die or hang."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import uuid
from typing import TYPE_CHECKING, Any

from megarl.cluster.ray_runtime import start_ray, with_variables
from megarl.cluster.variables import environment_worker_variables
from megarl.environments.base import Observation, StepResult
from megarl.environments.worker import EnvironmentActor, EnvironmentFacts
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.data import PromptSource
    from megarl.config.environments import EnvironmentRuntime
    from megarl.records import Prompt

log = logging.getLogger(__name__)

# A call that only waits is ended by the actor itself at its limit; one that computes, by us, this much later.
_GRACE_SECONDS = 2.0


class EnvironmentFailureError(RuntimeError):
    """An environment did not answer. ``blameless``: another episode took its process down."""

    explains_itself = True

    def __init__(self, reason: str, *, blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless


class _Worker:
    """One actor with its successors; ``generation`` counts them."""

    def __init__(self, actor_class: Any, arguments: tuple[Any, ...]) -> None:
        self._actor_class, self._arguments = actor_class, arguments
        self.generation = -1
        self.num_episodes = 0
        self.facts: EnvironmentFacts | None = None
        self.slots = asyncio.Semaphore(1)
        self.spawn()

    def spawn(self) -> None:
        self.generation += 1
        self.facts = None
        options = with_variables(environment_worker_variables())
        self.actor: Any = self._actor_class.options(num_cpus=0, max_restarts=0, **options).remote(
            *self._arguments
        )

    def replace(self, generation: int) -> None:
        """End this process and start another, unless somebody has done so already."""
        if generation == self.generation:
            self.kill()
            self.spawn()

    def kill(self) -> None:
        import ray

        ray.kill(self.actor, no_restart=True)


class EnvironmentWorkers:
    """The worker processes of one environment; start early, they get ready by themselves.

    Args:
        source: the configuration whose environment (:func:`megarl.environments.make`) they hold.
        field: its key, for messages.
        runtime: how many there are, and their limits.
    """

    def __init__(self, source: PromptSource, field: str, runtime: EnvironmentRuntime) -> None:
        import ray

        start_ray()
        self._field, self._runtime = field, runtime
        arguments = (source, field, runtime.timeout_seconds, [*sys.path, os.getcwd()])
        actor_class = ray.remote(EnvironmentActor)
        self._workers = [_Worker(actor_class, arguments) for _ in range(runtime.num_workers)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self.num_replaced = 0
        """Processes that died or were ended, so far."""

    def wait_ready(self) -> RemoteEnvironment:
        """The environment, when every worker takes calls.

        Raises:
            UserError: one could not be started; with the reason.
        """
        import ray

        for worker in self._workers:
            try:
                worker.facts = ray.get(
                    worker.actor.facts.remote(), timeout=self._runtime.start_timeout_seconds
                )
            except Exception as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, UserError):
                    raise cause from error
                raise UserError(
                    f"{self._field}: the environment could not be started: {_words(error)}"
                ) from error
        facts = self._workers[0].facts
        assert facts is not None
        return RemoteEnvironment(self, facts)

    def shutdown(self) -> None:
        """End all worker processes."""
        for worker in self._workers:
            worker.kill()

    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [worker.facts.pid for worker in self._workers if worker.facts is not None]

    def pick(self) -> _Worker:
        """The worker with the fewest open episodes."""
        if self._loop is not asyncio.get_running_loop():  # semaphores belong to one event loop
            self._loop = asyncio.get_running_loop()
            for worker in self._workers:
                worker.num_episodes = 0
                facts = worker.facts
                worker.slots = asyncio.Semaphore(facts.max_concurrency if facts is not None else 1)
        return min(self._workers, key=lambda worker: worker.num_episodes)

    async def call(self, worker: _Worker, generation: int | None, method: str, *arguments: Any) -> Any:
        """Call an actor; with ``generation``, only the one the episode was opened in.

        Raises:
            EnvironmentFailureError: it raised, died, or gave no answer in time.
        """
        async with worker.slots:
            if generation is not None and generation != worker.generation:
                raise EnvironmentFailureError("its process was replaced", blameless=True)
            await self._ready(worker)
            generation = worker.generation
            reference = getattr(worker.actor, method).remote(*arguments)
            limit = self._runtime.timeout_seconds + _GRACE_SECONDS
            return await self._answer(worker, generation, reference, limit)

    async def _ready(self, worker: _Worker) -> None:
        if worker.facts is None:
            reference, limit = worker.actor.facts.remote(), self._runtime.start_timeout_seconds
            worker.facts = await self._answer(worker, worker.generation, reference, limit)

    async def _answer(self, worker: _Worker, generation: int, reference: Any, limit: float) -> Any:
        from ray.exceptions import RayActorError

        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), limit)
        except TimeoutError as error:
            # The environment's own TimeoutError arrives here too: its process is well then.
            if getattr(error, "cause", None) is not None:
                raise EnvironmentFailureError(_words(error)) from error
            # With several calls at a time, those beside the one that blocks are not told apart from it.
            reason = f"no answer within {self._runtime.timeout_seconds:g} s; its process was ended"
        except RayActorError as error:
            alone = worker.facts is None or worker.facts.max_concurrency == 1
            if generation != worker.generation and not alone:
                raise EnvironmentFailureError("its process was replaced", blameless=True) from error
            reason = f"its process died: {_words(error)}"
        except Exception as error:
            raise EnvironmentFailureError(_words(error)) from error
        if generation == worker.generation:
            self.num_replaced += 1
            log.warning("%s: environment process replaced: %s", self._field, reason)
        worker.replace(generation)
        raise EnvironmentFailureError(reason)


class RemoteEnvironment:
    """An :class:`megarl.environments.base.Environment` whose episodes are played by worker processes."""

    def __init__(self, workers: EnvironmentWorkers, facts: EnvironmentFacts) -> None:
        self.workers, self._facts = workers, facts
        self.raw_actions = facts.raw_actions
        self.note = facts.note
        self.max_concurrency = facts.max_concurrency
        self._prompt: Prompt | None = None
        self._worker: _Worker | None = None
        self._generation: int | None = None
        self._name = ""

    def __copy__(self) -> RemoteEnvironment:
        return RemoteEnvironment(self.workers, self._facts)

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode; a verifier's needs no call, for its first observation is the prompt."""
        self._prompt = prompt
        self._worker = self.workers.pick()
        self._worker.num_episodes += 1
        if self._facts.one_step:
            return Observation(prompt.text)
        self._name = uuid.uuid4().hex
        observation: Observation = await self.workers.call(self._worker, None, "reset", self._name, prompt)
        self._generation = self._worker.generation
        return observation

    async def step(self, action: str) -> StepResult:
        """The policy's turn."""
        assert self._worker is not None, "step() before reset()"
        result: StepResult
        if self._facts.one_step:
            result = await self.workers.call(self._worker, None, "judge", self._prompt, action)
        else:
            result = await self.workers.call(self._worker, self._generation, "step", self._name, action)
        return result

    def end(self) -> None:
        """Let the worker forget the episode."""
        if self._worker is not None:
            self._worker.num_episodes -= 1
            if self._generation == self._worker.generation:
                self._worker.actor.end.remote(self._name)
            self._worker = None


def _words(error: BaseException) -> str:
    """An error of Ray's, or what caused it, in one line."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    name = type(cause).__name__
    return text[:300] if name.startswith("Ray") or "Actor" in name else f"{name}: {text[:300]}"
