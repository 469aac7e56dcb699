"""Rewards from plain functions, (prompt, response, answer) -> float, as a weighted sum."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from megarl.config.dotted import load_function
from megarl.environments.base import Verifier, VerifierError

if TYPE_CHECKING:
    from megarl.config.environments import FunctionConfig
    from megarl.records import Prompt


class FunctionEnvironment(Verifier):
    """Reward: sum over functions of weight times value.

    A function is called with the prompt's text, the response's text and the problem's answer ("" where there
    is none), all str. It may be a coroutine. ``info`` has each function's value under its name.
    """

    def __init__(self, config: FunctionConfig, field: str) -> None:
        self._functions = [
            (path.rpartition(":")[2], load_function(path, f"{field}.paths"), weight)
            for path, weight in zip(config.paths, config.weights or [1.0] * len(config.paths), strict=True)
        ]

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return the weighted sum; raise VerifierError if a function does not return a finite number."""
        question = str(prompt.metadata.get("question") or prompt.text)
        answer = str(prompt.metadata.get("answer") or "")
        total, info = 0.0, dict[str, Any]()
        for name, function, weight in self._functions:
            value = function(question, response_text, answer)
            if inspect.isawaitable(value):
                value = await value
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise VerifierError(f"{name} returned {type(value).__name__}, not a number") from None
            if not math.isfinite(number):
                raise VerifierError(f"{name} returned {number}")
            total += weight * number
            info[name] = number
        return total, info
