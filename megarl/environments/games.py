"""Base of the games, which generate their problems from seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Observation, Problem, StepResult

if TYPE_CHECKING:
    from megarl.records import Prompt


class Game(ABC):
    """A multi-turn environment that generates its problems.

    State is created in ``begin``, so that ``copy.copy`` before ``reset`` gives a separate episode.
    """

    @abstractmethod
    def problem(self, seed: int) -> Problem:
        """Return the problem of a seed; deterministic."""

    @abstractmethod
    def begin(self, metadata: dict[str, Any]) -> None:
        """Start an episode on a problem."""

    @abstractmethod
    def turn(self, action: str) -> tuple[str | None, float, dict[str, Any]]:
        """Process one turn; return the next observation (None at the end), the reward and info."""

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode on ``prompt``."""
        self.begin(dict(prompt.metadata))
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        """Process the policy's turn."""
        text, reward, info = self.turn(action)
        return StepResult(None if text is None else Observation(text), reward, text is None, info)
