"""User-defined environments, by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megarl.config.dotted import load_dotted
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import CustomEnvironmentConfig
    from megarl.environments.base import Environment


def load_class(path: str, field: str) -> Any:
    """Import the class "package.module:Class"; the current directory is searched last.

    Raises:
        UserError: the import fails, or the class lacks reset or step.
    """
    found = load_dotted(path, f"{field}.path")
    missing = [name for name in ("reset", "step") if not callable(getattr(found, name, None))]
    if missing:
        raise UserError(
            f"{field}.path: {path} is no environment: it lacks {' and '.join(missing)}"
            " (megarl.environments.Verifier has both)"
        )
    return found


def make_custom(config: CustomEnvironmentConfig, field: str) -> Environment:
    """Build an instance of the user's class; an error of its constructor becomes a UserError."""
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
