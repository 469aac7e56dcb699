"""Environment of a mixture: each prompt uses the environment of its source."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from megarl.environments.base import Environment, Observation, StepResult, is_one_step
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.records import Prompt


class MixtureEnvironment:
    """Delegates an episode to the environment of the prompt's source (``metadata["source"]``)."""

    def __init__(self, environments: dict[str, Environment]) -> None:
        self._environments = environments
        self._episode: Environment | None = None
        raw = {bool(getattr(each, "raw_actions", False)) for each in environments.values()}
        if len(raw) > 1:
            raise UserError(
                "data.train.sources: environments that read special tokens cannot be mixed with others"
            )
        self.raw_actions = raw.pop()
        self.one_step = all(is_one_step(each) for each in environments.values())
        self.max_concurrency = min(getattr(each, "max_concurrency", 1) for each in environments.values())

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode on ``prompt``."""
        self._episode = copy.copy(self._environments[prompt.metadata["source"]])
        return await self._episode.reset(prompt)

    async def step(self, action: str) -> StepResult:
        """Process the policy's turn."""
        assert self._episode is not None, "step() before reset()"
        return await self._episode.step(action)
