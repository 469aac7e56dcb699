"""What the games have in common: they make their own problems, each from a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Observation, Problem, StepResult

if TYPE_CHECKING:
    from megarl.records import Prompt


class Game(ABC):
    """An environment of several turns with problems of its own; subclasses say how one is played.

    ``copy.copy`` of a game before ``reset`` plays an episode of its own: state is made in ``begin``.
    """

    @abstractmethod
    def problem(self, seed: int) -> Problem:
        """The problem of that seed, the same one always."""

    @abstractmethod
    def begin(self, metadata: dict[str, Any]) -> None:
        """Set up the episode of a problem."""

    @abstractmethod
    def turn(self, action: str) -> tuple[str | None, float, dict[str, Any]]:
        """One turn: what the policy reads next (None at the end), the turn's reward, and info."""

    async def reset(self, prompt: Prompt) -> Observation:
        """See Environment."""
        self.begin(dict(prompt.metadata))
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        """See Environment."""
        text, reward, info = self.turn(action)
        return StepResult(None if text is None else Observation(text), reward, text is None, info)
