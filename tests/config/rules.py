"""A small configuration, and the violations of rules."""

from __future__ import annotations

from typing import Any

from megarl.config.section import Section, find_violations
from megarl.config.sft import SftConfig

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 64}


def violations(root: Any = SftConfig, **sections: Any) -> list[str]:
    """Return ``field: message`` of each violation of a ``root`` configuration with these sections."""
    config = root.model_validate(
        {
            "run": {"dir": "r"},
            "model": {"path": "m"},
            "optimizer": {"lr": 1e-3},
            "data": {"train": GYM},
            "training": {"num_steps": 10, "batch_size": 4},
        }
        | sections
    )
    return [f"{'.'.join(v.path)}: {v.message}" for v in find_violations(config)]


def data_violations(data: Section) -> list[str]:
    """Return the violations of a configuration's data section alone."""
    return [f"{'.'.join(v.path)}: {v.message}" for v in find_violations(data, ("data",))]
