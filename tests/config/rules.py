"""A small configuration, and the rules that it breaks."""

from __future__ import annotations

from typing import Any

from megarl.config.section import Section, find_violations
from megarl.config.sft import SftConfig

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 64}


def violations(root: Any = SftConfig, **sections: Any) -> list[str]:
    """``field: message`` of each, for a configuration of kind ``root`` with these sections replaced."""
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
    """The same of a configuration's data section alone."""
    return [f"{'.'.join(v.path)}: {v.message}" for v in find_violations(data, ("data",))]
