"""Qwen3 (dense): RMS norm on every q and k head, explicit head_dim, no biases by default."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: qwen3``."""
    bias = bool(config.get("attention_bias", False))
    return dense_architecture(
        ModelSpec.from_hf(
            "qwen3",
            config,
            head_dim=config["head_dim"] or config["hidden_size"] // config["num_attention_heads"],
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
        )
    )
