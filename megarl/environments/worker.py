"""The process in which an environment runs: the body of the Ray actor that remote.py starts."""

from __future__ import annotations

import asyncio
import copy
import os
import sys
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from megarl.environments.base import Environment, Observation, StepResult, Verifier

if TYPE_CHECKING:
    from megarl.config.data import PromptSource
    from megarl.records import Prompt

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """What the driver needs to know of an environment."""

    pid: int
    one_step: bool  # a verifier: one step, and reset has nothing to say
    max_concurrency: int
    raw_actions: bool
    note: str  # a line for the log, may be empty


class EnvironmentActor:
    """Holds one environment and its open episodes. Calls are coroutines: the driver limits how many run."""

    def __init__(
        self, source: PromptSource, field: str, timeout_seconds: float, import_paths: list[str]
    ) -> None:
        sys.path += [path for path in import_paths if path not in sys.path]  # the user's own packages
        from megarl.environments import make

        self._failure: Exception | None = None
        self._environment: Environment
        try:
            self._environment = make(source, field)
        except Exception as error:  # told by facts(): Ray would bury it in its own words
            self._failure = error
        self._timeout = timeout_seconds
        self._episodes: dict[str, Environment] = {}

    async def facts(self) -> EnvironmentFacts:
        """Sign of life, and what kind of environment this is; raises what making it raised."""
        if self._failure is not None:
            raise self._failure
        return EnvironmentFacts(
            pid=os.getpid(),
            one_step=isinstance(self._environment, Verifier),
            max_concurrency=int(getattr(self._environment, "max_concurrency", 1)),
            raw_actions=bool(getattr(self._environment, "raw_actions", False)),
            note=str(getattr(self._environment, "note", "")),
        )

    async def judge(self, prompt: Prompt, action: str) -> StepResult:
        """A verifier's whole episode in one call."""
        episode: Environment = copy.copy(self._environment)
        await self._limited(episode.reset(prompt))
        return await self._limited(episode.step(action))

    async def reset(self, name: str, prompt: Prompt) -> Observation:
        """Open an episode."""
        self._episodes[name] = copy.copy(self._environment)
        return await self._limited(self._episodes[name].reset(prompt))

    async def step(self, name: str, action: str) -> StepResult:
        """One turn of an open episode."""
        return await self._limited(self._episodes[name].step(action))

    async def end(self, name: str) -> None:
        """Forget an episode."""
        self._episodes.pop(name, None)

    async def _limited(self, answer: Awaitable[_Answer]) -> _Answer:
        """Ends what waits too long; what computes too long blocks this process, and the driver ends it."""
        try:
            async with asyncio.timeout(self._timeout) as limit:
                return await answer
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"no answer within {self._timeout:g} s") from None
            raise
