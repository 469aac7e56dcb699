"""Rules about environments. See :mod:`megarl.config.validate` for what a rule is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from megarl.config.data import LengthFilter
from megarl.config.environments import (
    CodeConfig,
    CustomEnvironmentConfig,
    EnvironmentSource,
    JudgeConfig,
    MultipleChoiceConfig,
    NumberGuessingConfig,
    RegexConfig,
    SlidingPuzzleConfig,
    ToolsConfig,
)
from megarl.config.introspect import Path
from megarl.config.schema import EvalConfig, OnlineConfig
from megarl.config.validate_data import curricula_of, parts_of
from megarl.config.violation import Violation

Violations = Iterator[Violation]
_Sampling = OnlineConfig | EvalConfig


def _environments(config: _Sampling) -> Violations:
    sources = [
        found
        for split in ("train", "held_out")
        for found in parts_of(getattr(config.data, split), ("data", split))
    ]
    for place, source in sources:
        environment, path = getattr(source, "environment", None), (*place, "environment")
        if isinstance(environment, MultipleChoiceConfig):
            yield from _letters(environment, path)
        elif isinstance(environment, RegexConfig):
            yield from _regex(environment, path)
        elif isinstance(environment, JudgeConfig):
            yield from _judge(environment, path, config)
        elif isinstance(environment, CustomEnvironmentConfig):
            yield from _dotted(environment, path)
        elif isinstance(environment, ToolsConfig):
            yield from _tools(environment, path, config)
        elif isinstance(environment, NumberGuessingConfig) and environment.low >= environment.high:
            yield Violation((*path, "high"), f"must be above low (got {environment.high})", ((*path, "low"),))
        elif isinstance(environment, CodeConfig):
            limit = config.rollout.environments.timeout_seconds
            if environment.timeout_seconds >= limit:
                yield Violation(
                    (*path, "timeout_seconds"),
                    f"must be below rollout.environments.timeout_seconds = {limit:g}, which would end the"
                    f" whole judging (got {environment.timeout_seconds:g})",
                    (("rollout", "environments", "timeout_seconds"),),
                )
        if isinstance(source, EnvironmentSource) and not isinstance(
            environment, NumberGuessingConfig | SlidingPuzzleConfig | CustomEnvironmentConfig
        ):
            kind = getattr(environment, "kind", None)
            yield Violation(
                (*path, "kind"), f"makes no problems of its own: use another data source (got {kind})"
            )


def _letters(environment: MultipleChoiceConfig, path: Path) -> Violations:
    letters = environment.choices
    if not letters.isascii() or not letters.isalpha() or len(set(letters.upper())) < len(letters):
        yield Violation((*path, "choices"), f"must be letters, each once (got {letters!r})")


def _pattern(pattern: str, path: Path) -> Iterator[Violation | re.Pattern[str]]:
    try:
        yield re.compile(pattern)
    except re.error as error:
        yield Violation(path, f"is no regular expression: {error} (got {pattern!r})")


def _regex(environment: RegexConfig, path: Path) -> Violations:
    for found in _pattern(environment.pattern, (*path, "pattern")):
        if isinstance(found, Violation):
            yield found
        elif "answer" not in found.groupindex and environment.format_reward:
            yield Violation(
                (*path, "format_reward"),
                "has no effect: environment.pattern has no group `answer`, so every match gets 1"
                f" (got {environment.format_reward})",
                ((*path, "pattern"),),
            )


def _judge(environment: JudgeConfig, path: Path, config: _Sampling) -> Violations:
    if "{response}" not in environment.prompt:
        yield Violation((*path, "prompt"), "must hold {response}: the judge would not see what it grades")
    if not re.match(r"https?://[^/]", environment.base_url):
        message = f"must be an http or https address (got {environment.base_url!r})"
        yield Violation((*path, "base_url"), message)
    for found in _pattern(environment.score_pattern, (*path, "score_pattern")):
        if isinstance(found, Violation):
            yield found
        elif not found.groups:
            yield Violation((*path, "score_pattern"), f"needs a group, the score (got {found.pattern!r})")
    attempts = environment.num_attempts
    longest = attempts * environment.request_timeout_seconds
    longest += environment.retry_seconds * (2 ** (attempts - 1) - 1)
    limit = config.rollout.environments.timeout_seconds
    if longest >= limit:
        yield Violation(
            (*path, "request_timeout_seconds"),
            f"{attempts} requests and the pauses between may take {longest:g} s, and"
            f" rollout.environments.timeout_seconds = {limit:g} would end them (got"
            f" {environment.request_timeout_seconds:g})",
            (("rollout", "environments", "timeout_seconds"), (*path, "num_attempts")),
        )


def _tools(environment: ToolsConfig, path: Path, config: _Sampling) -> Violations:
    if ("search" in environment.tools) != (environment.corpus is not None):
        yield Violation(
            (*path, "corpus"),
            "is the documents of the tool search: set both or neither (got"
            f" {environment.corpus!r} with tools {environment.tools})",
            ((*path, "tools"),),
        )
    if not config.data.format.chat_template:
        yield Violation(
            (*path, "kind"),
            "tools need data.format.chat_template: true",
            (("data", "format", "chat_template"),),
        )


def _dotted(environment: CustomEnvironmentConfig, path: Path) -> Violations:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", environment.path):
        yield Violation((*path, "path"), f'is written "package.module:Class" (got {environment.path!r})')


def _curriculum(config: _Sampling) -> Violations:
    for split in ("train", "held_out"):
        for path in curricula_of(config, split):
            if split == "held_out" or isinstance(config, EvalConfig):
                yield Violation(path, "levels rise in training only: held-out problems stay the same")
            elif config.data.on_bad_row == "skip" or config.data.filter != LengthFilter():
                yield Violation(
                    path,
                    "data.filter and data.on_bad_row = skip choose among problems that are made once, at the"
                    " start; those of a curriculum change with its level",
                    (("data", "filter"), ("data", "on_bad_row")),
                )


ENVIRONMENT_RULES: list[Callable[[_Sampling], Violations]] = [_environments, _curriculum]
