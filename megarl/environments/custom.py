"""Environments from the user's own package, by dotted path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import CustomEnvironmentConfig
    from megarl.environments.base import Environment


def load_class(path: str, field: str) -> Any:
    """The class that "package.module:Class" names; the current directory is searched too.

    Raises:
        UserError: it cannot be imported, or has no reset and step.
    """
    module_name, _, class_name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(
            f"{field}.path: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"{field}.path: {module_name} has no {class_name}")
    missing = [name for name in ("reset", "step") if not callable(getattr(found, name, None))]
    if missing:
        raise UserError(
            f"{field}.path: {path} is no environment: it lacks {' and '.join(missing)}"
            " (megarl.environments.Verifier has both)"
        )
    return found


def make_custom(config: CustomEnvironmentConfig, field: str) -> Environment:
    """An instance of the user's class. Raises UserError with what its constructor raised."""
    made = load_class(config.path, field)
    try:
        environment: Environment = made(**config.arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{field}.arguments: {config.path} cannot be made: {type(error).__name__}: {error}"
        ) from error
    return environment
