"""Qwen3 (dense): RMS norm on every q and k head, head_dim of its own, no biases by default."""

from __future__ import annotations

from typing import Any

from megarl.errors import UserError
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec, RopeSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Table for ``model_type: qwen3``."""
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported for qwen3")
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    return dense_architecture(
        ModelSpec(
            family="qwen3",
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim", 128),
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope=RopeSpec.from_hf(config),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            init_std=config.get("initializer_range", 0.02),
        )
    )
