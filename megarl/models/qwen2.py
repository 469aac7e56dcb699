"""Qwen2 and Qwen2.5: biases on q, k and v; no sliding window."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: qwen2``."""
    return dense_architecture(ModelSpec.from_hf("qwen2", config, qkv_bias=True))
