"""What differs between runs: their configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.run_directory import flatten

_OWN = ("run.dir",)  # differs by nature


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return dotted key -> value in each configuration (None: absent) of the keys that differ."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [each.get(key) for each in flat] for key in keys if key not in _OWN}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}
