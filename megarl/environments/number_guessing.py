"""Number guessing: the environment answers higher or lower."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Problem
from megarl.environments.games import Game
from megarl.environments.text import last_number

if TYPE_CHECKING:
    from megarl.config.environments import NumberGuessingConfig


class NumberGuessingEnvironment(Game):
    """A number in [low, high]; the last number in an action is the guess.

    The reward is 1 when it is found, minus ``turn_penalty`` per earlier guess; else 0. The episode ends
    then or after ``max_guesses`` (actions without a number in the range count as guesses).
    """

    def __init__(self, config: NumberGuessingConfig) -> None:
        self._config = config
        self._secret = self._guesses = 0

    def problem(self, seed: int) -> Problem:
        """Draw a number uniformly."""
        low, high = self._config.low, self._config.high
        secret = random.Random(seed).randint(low, high)
        text = f"Guess my number from {low} to {high}. I answer higher or lower. Reply with a number only."
        return Problem(text, str(secret))

    def begin(self, metadata: dict[str, Any]) -> None:
        """Start an episode on a problem."""
        self._secret, self._guesses = int(metadata["answer"]), 0

    def turn(self, action: str) -> tuple[str | None, float, dict[str, Any]]:
        """Process one guess."""
        config = self._config
        self._guesses += 1
        text = last_number(action)
        guess = int(text) if text.lstrip("-").isdigit() and len(text) < 20 else None
        info = {"guesses": self._guesses, "answer": text, "found": guess == self._secret}
        if guess == self._secret:
            return None, 1.0 - config.turn_penalty * (self._guesses - 1), info
        if self._guesses == config.max_guesses:
            return None, 0.0, info
        if guess is None or not config.low <= guess <= config.high:
            return f"a number from {config.low} to {config.high}", 0.0, info
        return "higher" if guess < self._secret else "lower", 0.0, info
