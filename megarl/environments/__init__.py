"""Environments, which score responses. ``make`` builds the environment of a data source."""

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

# cellpylib, a dependency of reasoning-gym, raises SyntaxWarnings when it is compiled.
warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*cellpylib")


def make(source: PromptSource, field: str = "data.train") -> Environment:
    """Build the environment that scores responses to ``source``'s prompts; ``field`` is its key.

    Raises:
        UserError: an unknown task, invalid task arguments, or an environment that cannot be built.
    """
    if source.source == "reasoning_gym":
        from megarl.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(source, field)
    if source.source == "mixture":
        from megarl.environments.mixture import MixtureEnvironment

        parts = source.sources.items()
        return MixtureEnvironment({name: make(part, f"{field}.sources.{name}") for name, part in parts})
    if source.source == "benchmark":  # the benchmark determines its verifier
        return make_environment(source.environment, field)
    return make_environment(source.environment, f"{field}.environment")


def make_environment(config: EnvironmentConfig, field: str) -> Environment:
    """Build the environment of ``config``; the libraries of each kind are imported on use."""
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
    """Return whether every prompt needs a reference answer."""
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
    """Raise UserError for the first result of :func:`wrong_references`."""
    for _, message in wrong_references(config, field, lines):
        raise UserError(message)


def wrong_references(
    config: EnvironmentConfig, field: str, lines: Iterable[tuple[str, str, dict[str, Any]]]
) -> Iterator[tuple[int, str]]:
    """Find reference answers that the environment cannot use, before anything is sampled.

    Args:
        config: of the environment.
        field: its configuration key.
        lines: (where, answer, row) of each prompt; ``where`` is the prefix of messages.

    Yields:
        Position and reason of each unusable reference.

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
