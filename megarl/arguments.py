"""Command lines as people write them, turned into the one form that the parser reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

_SETTING = re.compile(r"--?([a-z][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
_FILE = re.compile(r"[^=]+\.ya?ml", re.IGNORECASE)


def nearest_command(name: str, commands: Collection[str]) -> str | None:
    """The command that was meant, None where nothing comes near."""
    near = get_close_matches(name.lower(), commands, n=1, cutoff=0.5)
    return near[0] if near else None


def normalise(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--section.key=value`` and ``--section.key value`` as overrides, a YAML file as --config.

    >>> normalise(["run.yaml", "--optimizer.lr", "1e-4", "--run.seed=2"])
    ['--config', 'run.yaml', 'optimizer.lr=1e-4', 'run.seed=2']
    """
    result: list[str] = []
    rest = list(arguments)
    named = any(each in ("-c", "--config") or each.startswith(("--config=", "-c=")) for each in rest)
    while rest:
        each = rest.pop(0)
        if each in ("-c", "--config"):
            result += [each, *rest[:1]]
            rest = rest[1:]
        elif (setting := _SETTING.fullmatch(each)) is not None:
            key = setting[1].replace("-", "_")
            if setting[2] is not None:
                result.append(key + setting[2])
            elif rest and not rest[0].startswith("--"):
                result.append(f"{key}={rest.pop(0)}")
            else:
                result.append(each)  # has no value: the parser refuses it by its name
        elif not named and _FILE.fullmatch(each):
            named = True
            result += ["--config", each]
        else:
            result.append(each)
    return result
