"""Renamed configuration keys: errors name the new key, and runs with old keys can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "algorithm.clip_ratio_low": "algorithm.clip_low",
    "algorithm.clip_ratio_high": "algorithm.clip_high",
    "algorithm.clip_ratio_c": "algorithm.dual_clip",
}
"""Old key -> new key, as full paths; docs/migration.md has the same list."""


def with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``config`` with old keys replaced by new ones."""
    return _renamed(config, "")


def _renamed(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        new = RENAMED.get(path, path).rpartition(".")[2]
        result[new] = _renamed(value, f"{path}.") if isinstance(value, dict) else value
    return result
