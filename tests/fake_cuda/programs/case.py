"""Shared by the programs of this folder: cases by name, results as the last line of output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

CASES: dict[str, Callable[..., Any]] = {}


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function callable from the command line."""
    CASES[function.__name__] = function
    return function


def main() -> None:
    """Run ``program.py CASE ARGUMENT...``, the case once per argument, and print the list of results."""
    name, *arguments = sys.argv[1:]
    results = [CASES[name](argument) for argument in arguments] if arguments else CASES[name]()
    print(json.dumps(results), flush=True)
