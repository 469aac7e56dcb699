"""User objects named by import path, "package.module:name"."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from megarl.errors import UserError

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_dotted(path: str) -> bool:
    """Return whether ``path`` has the form "package.module:name"."""
    return _FORM.fullmatch(path) is not None


def load_dotted(path: str, field: str) -> Any:
    """Import the object that ``path`` names; the current directory is searched last.

    Raises:
        UserError: the import fails; the message names ``field``, the configuration key.
    """
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything on import
        raise UserError(f"{field}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{field}: {module_name} has no {name}")
    return getattr(module, name)


def load_function(path: str, field: str) -> Any:
    """Import a callable as :func:`load_dotted` does; UserError if it is not callable."""
    found = load_dotted(path, field)
    if not callable(found):
        raise UserError(f"{field}: {path} is a {type(found).__name__}, not a function")
    return found
