"""Look up what a configuration names, without a model and before anything starts.

Rules and :mod:`megarl.config.files` have checked what stands in the configuration and its files. Here are
names that a library or the user's own modules must know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megarl.config.data import PromptReasoningGymSource, ReasoningGymSource, parts_of
from megarl.config.dotted import load_function
from megarl.config.environments import CustomEnvironmentConfig, FunctionConfig, JudgeConfig
from megarl.config.grpo import GrpoConfig
from megarl.errors import UserError


def check_names(config: Any, *, here: bool) -> None:
    """Look up the names in a job's configuration.

    Args:
        config: the root.
        here: the job runs on this machine, whose environment variables it reads.

    Raises:
        UserError: a line for each unknown reasoning-gym task, argument or curriculum, each function or class
            that cannot be imported, and each missing variable.
    """
    found: list[str] = []
    for look_up in _lookups(config, here):
        try:
            look_up()
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("\n".join(dict.fromkeys(found)))


def _lookups(config: Any, here: bool) -> Iterator[Callable[[], object]]:
    for split in ("train", "held_out"):
        for at, source in parts_of(getattr(config.data, split, None), f"data.{split}"):
            if isinstance(source, ReasoningGymSource):
                yield partial(_look_up_task, source, at)
            if (environment := getattr(source, "environment", None)) is not None:
                yield from _of_environment(environment, f"{at}.environment", here)
    if isinstance(config, GrpoConfig):
        for name in ("loss", "advantage"):
            if (path := getattr(config.algorithm, name)) is not None:
                yield partial(load_function, path, f"algorithm.{name}")


def _look_up_task(source: ReasoningGymSource, at: str) -> None:
    if isinstance(source, PromptReasoningGymSource) and source.curriculum is not None:
        from megarl.environments.curriculum import Curriculum

        Curriculum(source, source.curriculum, at)
    else:
        from megarl.environments.tasks import make_dataset

        make_dataset(source, at)


def _of_environment(environment: Any, field: str, here: bool) -> Iterator[Callable[[], object]]:
    match environment:
        case CustomEnvironmentConfig():
            from megarl.environments.custom import load_class

            yield partial(load_class, environment.path, field)
        case FunctionConfig():
            yield from (partial(load_function, path, f"{field}.paths") for path in environment.paths)
        case JudgeConfig(api_key_variable=str(variable)) if here:
            yield partial(_look_up_variable, variable, f"{field}.api_key_variable")


def _look_up_variable(variable: str, field: str) -> None:
    if not os.environ.get(variable):
        raise UserError(f"{field}: {variable} is not set")
