"""What judges a response. ``make`` turns a data source's configuration into its environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megarl.environments.base import Environment, Observation, StepResult, Verifier, VerifierError, grade
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.schema import PromptSource

__all__ = ["Environment", "Observation", "StepResult", "Verifier", "VerifierError", "grade", "make"]


def make(source: PromptSource, field: str = "data.train") -> Environment:
    """The environment that judges answers to ``source``'s problems; ``field`` is its configuration key.

    Raises:
        UserError: an unknown task or bad task arguments, as :func:`megarl.data.load_prompts` words them.
    """
    if source.source == "reasoning_gym":
        from megarl.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(source, field)
    if source.source == "benchmark":
        from megarl.data.benchmarks import find

        if (verifier := find(source).verifier) != "math":
            raise UserError(
                f"{field}.name: {source.name} needs a {verifier} environment, which is not there yet"
            )
    from megarl.environments.math import MathEnvironment

    return MathEnvironment()
