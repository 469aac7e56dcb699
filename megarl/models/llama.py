"""Llama 2, 3 and 3.x, and models with the same architecture (SmolLM2, ...)."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: llama``."""
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return dense_architecture(
        ModelSpec.from_hf("llama", config, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
    )
