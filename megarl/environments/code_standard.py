"""Objects of the standard library that both processes of a judged program have, and that travel by name.

Imports nothing but the standard library: it is also run as a file, in the sandbox.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from typing import Any

_TYPES_OF = ("builtins", "collections", "datetime", "decimal", "fractions", "numbers", "types", "typing")
# Not unittest's, whose exceptions skip a test.
EXCEPTIONS_OF = frozenset(
    (
        "array",
        "asyncio",
        "binascii",
        "calendar",
        "concurrent",
        "configparser",
        "contextlib",
        "copy",
        "csv",
        "dataclasses",
        "email",
        "graphlib",
        "heapq",
        "http",
        "inspect",
        "io",
        "ipaddress",
        "json",
        "pickle",
        "queue",
        "re",
        "shutil",
        "socket",
        "sqlite3",
        "statistics",
        "struct",
        "subprocess",
        "tarfile",
        "tomllib",
        "urllib",
        "uuid",
        "xml",
        "zipfile",
        "zlib",
    )
)
_TEXTS = ("json", "re", "string")
_NUMBERS = ("bisect", "cmath", "fractions", "heapq", "math", "operator", "statistics")
PURE = frozenset((*_TEXTS, *_NUMBERS, "builtins", "collections", "copy", "functools", "itertools"))
"""Modules whose functions are the same in both processes."""


def exception_base(kind: type) -> type | None:
    """The nearest builtin exception that a class derives from."""
    known = exceptions()
    return next((base for base in kind.__mro__ if known.get(base.__name__) is base), None)


@functools.cache
def exceptions() -> dict[str, type]:
    """The builtin exceptions by name."""
    import builtins

    found = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, BaseException)}


def make_exception(kind: type, args: tuple[Any, ...]) -> Any:
    """An exception of a class whose constructor may want other arguments."""
    try:
        return kind(*args)
    except Exception:
        made = kind.__new__(kind, *args)
        made.args = args
        return made


def is_known(module: str, kind: type) -> bool:
    """Whether a class is the same in both processes, and passed by its name."""
    return module in _TYPES_OF or (issubclass(kind, BaseException) and module.split(".")[0] in EXCEPTIONS_OF)


def name_of(value: Any) -> list[str] | None:
    """Module and name of what is the standard library's own; None for everything else."""
    owner = getattr(value, "__self__", None)
    if not isinstance(value, type) and owner is not None and not isinstance(owner, types.ModuleType):
        return None  # bound to an object
    described = getattr(value, "__objclass__", None)
    module = getattr(value, "__module__", None) or getattr(described, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    module = _PUBLIC.get(module, module)
    return [module, name] if find(module, name) is value else None


_PUBLIC = {
    f"_{name}": name for name in ("bisect", "functools", "heapq", "operator", "queue", "random", "struct")
}


def find(module: str, name: str) -> Any:
    """Return the object of this name in the standard library if its module is imported or pure; else None."""
    if module.split(".")[0] not in sys.stdlib_module_names:
        return None
    found: Any = sys.modules.get(module)
    if found is None and module in PURE:
        found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def is_standard(value: Any) -> bool:
    """Whether a function or class of the standard library is passed by its name."""
    name = name_of(value)
    if name is None:
        return False
    return is_known(name[0], value) if isinstance(value, type) else name[0] in PURE
