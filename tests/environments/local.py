"""An environment in this process behind a worker environment's interface."""

from __future__ import annotations

import copy
from typing import Any

from megarl.environments.base import Observation, StepResult
from megarl.environments.worker import ReadsTurns
from megarl.records import Prompt, TokenIds


class LocalEnvironment:
    """An :class:`megarl.environments.base.EpisodeEnvironment`."""

    def __init__(self, environment: Any, read: ReadsTurns) -> None:
        self._environment, self._read = environment, read
        self.raw_actions = bool(getattr(environment, "raw_actions", False))
        self.note = ""

    def __copy__(self) -> LocalEnvironment:
        return LocalEnvironment(copy.copy(self._environment), self._read)

    async def reset(self, prompt: Prompt) -> Observation:
        found: Observation = await self._environment.reset(prompt)
        return found

    async def step(self, sampled: TokenIds) -> StepResult:
        found: StepResult = await self._environment.step(self._read(sampled, raw=self.raw_actions))
        return found

    def end(self) -> None: ...
