"""The model to train, and what its directory says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from megarl.config.section import Section, Text


class ModelConfig(Section):
    """The model to train."""

    path: Text
    """Hugging Face directory: config.json, safetensors, tokenizer (eval: or a Megatron checkpoint)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type. fp32 is the fast one on CPUs without AMX/AVX512-BF16."""


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether a directory is a Megatron distributed checkpoint, or has a tracker file that names one."""
    return any((Path(path) / name).is_file() for name in (".metadata", "latest_checkpointed_iteration.txt"))


def read_model_config(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face directory (OSError or ValueError where it cannot be read)."""
    value = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("config.json does not hold an object")
    return value
