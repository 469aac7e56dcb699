"""Functions as bytes, code included: another process cannot import what a notebook defines."""

from __future__ import annotations

from typing import Any


def by_value(function: Any) -> bytes:
    """Return a pickle of ``function`` that any process of this Python version can load.

    Imported modules stay references; globals and closures that the function uses are copied.
    """
    from ray import cloudpickle

    return cloudpickle.dumps(function)
