"""Environments in worker processes: Ray actors that run the driver's episodes."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import uuid
from typing import TYPE_CHECKING, Any

from megarl.cluster.ray_runtime import start_ray
from megarl.environments.base import Observation, StepResult
from megarl.environments.judging import Judges
from megarl.environments.process import EnvironmentFailureError, WorkerProcess, words
from megarl.environments.worker import EnvironmentActor, EnvironmentFacts, ReadsTurns
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.data import PromptSource
    from megarl.config.environments import EnvironmentRuntime
    from megarl.records import Prompt, TokenIds


class EnvironmentWorkers:
    """The worker processes of one environment; they start in the background.

    Args:
        source: data source of the environment (:func:`megarl.environments.make`).
        field: its configuration key, for messages.
        runtime: number of workers, and limits.
        read: decodes turns of the policy; sent to the workers.
    """

    def __init__(
        self, source: PromptSource, field: str, runtime: EnvironmentRuntime, read: ReadsTurns
    ) -> None:
        import ray

        start_ray()
        self._field, self._runtime = field, runtime
        arguments = (source, field, runtime.timeout_seconds, [*sys.path, os.getcwd()], read)
        actor_class = ray.remote(EnvironmentActor)
        self.processes = [
            WorkerProcess(actor_class, arguments, field, runtime) for _ in range(runtime.num_workers)
        ]
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_replaced(self) -> int:
        """Number of processes that died or were killed so far."""
        return sum(process.num_replaced for process in self.processes)

    def wait_ready(self) -> RemoteEnvironment:
        """Wait until every worker is ready; return the environment.

        Raises:
            UserError: a worker could not be started; the message has the reason.
        """
        import ray

        for process in self.processes:
            try:
                process.facts = ray.get(
                    process.actor.facts.remote(), timeout=self._runtime.start_timeout_seconds
                )
            except Exception as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, UserError):
                    raise cause from error
                raise UserError(
                    f"{self._field}: the environment could not be started: {words(error)}"
                ) from error
        facts = self.processes[0].facts
        assert facts is not None
        return RemoteEnvironment(self, facts, Judges(self.processes, facts.max_concurrency))

    def shutdown(self) -> None:
        """Kill all worker processes."""
        for process in self.processes:
            process.kill()

    def pids(self) -> list[int]:
        """Return the process ids of ready workers."""
        return [process.facts.pid for process in self.processes if process.facts is not None]

    def local_pids(self) -> list[int]:
        """Return the process ids of ready workers on this host."""
        here, facts = socket.gethostname(), (process.facts for process in self.processes)
        return [each.pid for each in facts if each is not None and each.host == here]

    def pick(self) -> WorkerProcess:
        """Return the worker with the fewest open episodes."""
        if self._loop is not asyncio.get_running_loop():  # semaphores belong to one event loop
            self._loop = asyncio.get_running_loop()
            for process in self.processes:
                process.enter_loop()
        return min(self.processes, key=lambda process: process.num_episodes)

    async def call(self, process: WorkerProcess, generation: int | None, method: str, *arguments: Any) -> Any:
        """Call an actor; with ``generation``, only the process that the episode was started in.

        Raises:
            EnvironmentFailureError: it raised, died or timed out.
        """
        async with process.slots:
            if generation is not None and generation != process.generation:
                raise EnvironmentFailureError("its process was replaced", blameless=True)
            await process.ready()
            return await process.call(process.generation, method, *arguments)


class RemoteEnvironment:
    """An :class:`megarl.environments.base.EpisodeEnvironment` whose episodes run in worker processes."""

    def __init__(self, workers: EnvironmentWorkers, facts: EnvironmentFacts, judges: Judges) -> None:
        self.workers, self._facts, self._judges = workers, facts, judges
        self.raw_actions = facts.raw_actions
        self.note = facts.note
        self._prompt: Prompt | None = None
        self._process: WorkerProcess | None = None
        self._generation: int | None = None
        self._name = ""

    def __copy__(self) -> RemoteEnvironment:
        return RemoteEnvironment(self.workers, self._facts, self._judges)

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode; a verifier needs no call, since its first observation is the prompt."""
        self._prompt = prompt
        if self._facts.one_step:
            return Observation(prompt.text)
        self._process = self.workers.pick()
        self._process.num_episodes += 1
        self._name = uuid.uuid4().hex
        observation: Observation = await self.workers.call(self._process, None, "reset", self._name, prompt)
        self._generation = self._process.generation
        return observation

    async def step(self, sampled: TokenIds) -> StepResult:
        """Process the policy's turn."""
        assert self._prompt is not None, "step() before reset()"
        if self._facts.one_step:
            return await self._judges.judge(self._prompt, sampled)
        assert self._process is not None
        result: StepResult = await self.workers.call(
            self._process, self._generation, "step", self._name, sampled
        )
        return result

    def end(self) -> None:
        """Release the episode in the worker."""
        if self._process is not None:
            self._process.num_episodes -= 1
            if self._generation == self._process.generation:
                self._process.actor.end.remote(self._name)
            self._process = None
