"""Environments from the user's own package, by dotted path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megarl.config.dotted import load_dotted
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import CustomEnvironmentConfig
    from megarl.environments.base import Environment


def load_class(path: str, field: str) -> Any:
    """The class that "package.module:Class" names; the current directory is searched too.

    Raises:
        UserError: it cannot be imported, or has no reset and step.
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
