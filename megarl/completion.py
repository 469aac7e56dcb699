"""Completion of command lines in a shell, by argcomplete: the shell runs `megarl` and asks it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", choices=SHELLS, help="the shell whose start-up file takes what is printed")


def run(options: argparse.Namespace) -> int:
    """Print what the shell has to read once."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["megarl"], shell=options.shell))
    return 0


def complete(parser: argparse.ArgumentParser, with_settings: Mapping[str, argparse.ArgumentParser]) -> None:
    """If a shell asks, answer and end the process; else do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for name, command in with_settings.items():
        _complete_settings(command, name)
    argcomplete.autocomplete(parser)


def _complete_settings(parser: argparse.ArgumentParser, name: str) -> None:
    """Complete the key=value arguments of a command with its keys, and with YAML files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_settings(inner, name)
        elif action.dest in ("overrides", "config"):
            action.completer = _Settings(name, keys=action.dest == "overrides")  # type: ignore[attr-defined]


class _Settings:
    """argcomplete's protocol of a completer: called with the word's beginning."""

    def __init__(self, command: str, *, keys: bool) -> None:
        self._command, self._keys = command, keys

    def __call__(self, prefix: str, **_: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        files = FilesCompleter(("yaml", "yml"))(prefix)
        return [*(self._settings() if self._keys else []), *files]

    def _settings(self) -> list[str]:
        from megarl.config.introspect import walk
        from megarl.jobs import roots

        known = roots()
        asked = [known[self._command]] if self._command in known else known.values()
        return sorted({f"{'.'.join(path)}=" for root in asked for path in walk(root)})
