"""What judges a response. ``make`` turns a data source's configuration into its environment."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from megarl.config.environments import (
    CodeConfig,
    CustomEnvironmentConfig,
    FunctionConfig,
    JudgeConfig,
    MathEnvironmentConfig,
    MultipleChoiceConfig,
    NumberGuessingConfig,
    RegexConfig,
    RewardModelConfig,
    SlidingPuzzleConfig,
    ToolsConfig,
)
from megarl.environments.base import (
    Environment,
    Observation,
    Problem,
    StepResult,
    Verifier,
    VerifierError,
    grade,
)
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.data import PromptSource
    from megarl.config.environments import EnvironmentConfig

__all__ = [
    "Environment",
    "Observation",
    "Problem",
    "StepResult",
    "Verifier",
    "VerifierError",
    "check_references",
    "grade",
    "make",
    "make_environment",
    "needs_answer",
    "wrong_references",
]

# reasoning-gym brings cellpylib, which Python complains of whenever it compiles it.
warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*cellpylib")


def make(source: PromptSource, field: str = "data.train") -> Environment:
    """The environment that judges answers to ``source``'s problems; ``field`` is its configuration key.

    Raises:
        UserError: an unknown task or bad task arguments, as :func:`megarl.data.load_prompts` words them, or
            an environment that cannot be made.
    """
    if source.source == "reasoning_gym":
        from megarl.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(source, field)
    if source.source == "mixture":
        from megarl.environments.mixture import MixtureEnvironment

        parts = source.sources.items()
        return MixtureEnvironment({name: make(part, f"{field}.sources.{name}") for name, part in parts})
    if source.source == "benchmark":  # its verifier is no field of its own
        return make_environment(source.environment, field)
    return make_environment(source.environment, f"{field}.environment")


def make_environment(config: EnvironmentConfig, field: str) -> Environment:
    """The environment ``config`` describes. Each kind's libraries are imported here, when it is used."""
    if isinstance(config, MathEnvironmentConfig):
        from megarl.environments.math import MathEnvironment

        return MathEnvironment(config.extract)
    if isinstance(config, MultipleChoiceConfig):
        from megarl.environments.multiple_choice import MultipleChoiceEnvironment

        return MultipleChoiceEnvironment(config)
    if isinstance(config, RegexConfig):
        from megarl.environments.regex import RegexEnvironment

        return RegexEnvironment(config)
    if isinstance(config, JudgeConfig):
        from megarl.environments.judge import JudgeEnvironment

        return JudgeEnvironment(config, field)
    if isinstance(config, RewardModelConfig):
        from megarl.environments.reward_model import RewardModelEnvironment

        return RewardModelEnvironment(config, field)
    if isinstance(config, CodeConfig):
        from megarl.environments.code import CodeEnvironment

        return CodeEnvironment(config, field)
    if isinstance(config, FunctionConfig):
        from megarl.environments.function import FunctionEnvironment

        return FunctionEnvironment(config, field)
    return _make_of_turns(config, field)


def _make_of_turns(
    config: NumberGuessingConfig | SlidingPuzzleConfig | ToolsConfig | CustomEnvironmentConfig, field: str
) -> Environment:
    if isinstance(config, NumberGuessingConfig):
        from megarl.environments.number_guessing import NumberGuessingEnvironment

        return NumberGuessingEnvironment(config)
    if isinstance(config, SlidingPuzzleConfig):
        from megarl.environments.sliding_puzzle import SlidingPuzzleEnvironment

        return SlidingPuzzleEnvironment(config)
    if isinstance(config, ToolsConfig):
        from megarl.environments.tool_use import ToolUseEnvironment

        return ToolUseEnvironment(config, make_environment(config.answer, f"{field}.answer"), field)
    from megarl.environments.custom import make_custom

    return make_custom(config, field)


def needs_answer(config: EnvironmentConfig) -> bool:
    """Whether every problem must bring a reference answer."""
    if isinstance(config, RegexConfig):
        return "(?P<answer>" in config.pattern
    if isinstance(config, JudgeConfig):
        return "{answer}" in config.prompt
    if isinstance(config, ToolsConfig):
        return needs_answer(config.answer)
    return isinstance(config, MathEnvironmentConfig | MultipleChoiceConfig)


def check_references(
    config: EnvironmentConfig, field: str, lines: Iterable[tuple[str, str, dict[str, Any]]]
) -> None:
    """As wrong_references; raises UserError at the first."""
    for _, message in wrong_references(config, field, lines):
        raise UserError(message)


def wrong_references(
    config: EnvironmentConfig, field: str, lines: Iterable[tuple[str, str, dict[str, Any]]]
) -> Iterator[tuple[int, str]]:
    """Reference answers that the environment cannot use, found before anything is sampled.

    Args:
        config: the environment's.
        field: its key.
        lines: (where, answer, the row) of each problem; ``where`` begins the message.

    Yields:
        The position of each, and why it cannot be used.

    Raises:
        UserError: a custom environment that cannot be imported.
    """
    if isinstance(config, MathEnvironmentConfig):
        from megarl.environments.math import wrong_references as wrong_math

        yield from wrong_math((where, answer) for where, answer, _ in lines)
    elif isinstance(config, MultipleChoiceConfig):
        from megarl.environments.multiple_choice import MultipleChoiceEnvironment

        environment = MultipleChoiceEnvironment(config)
        for position, (where, answer, entry) in enumerate(lines):
            if problem := environment.check(entry, answer):
                yield position, f"{where}: {problem}"
    elif isinstance(config, CodeConfig):
        from megarl.environments.code import check

        for position, (where, _, entry) in enumerate(lines):
            if problem := check(entry, config):
                yield position, f"{where}: {problem}"
    elif isinstance(config, ToolsConfig):
        yield from wrong_references(config.answer, f"{field}.answer", lines)
    elif isinstance(config, FunctionConfig):
        from megarl.config.dotted import load_function

        for path in config.paths:
            load_function(path, f"{field}.paths")
    elif isinstance(config, CustomEnvironmentConfig):
        from megarl.environments.custom import load_class

        load_class(config.path, field)
