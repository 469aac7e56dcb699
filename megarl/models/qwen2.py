"""Qwen2 and Qwen2.5: biases on q, k and v; no sliding window."""

from __future__ import annotations

from typing import Any

from megarl.errors import UserError
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec, RopeSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Table for ``model_type: qwen2``."""
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported for qwen2")
    heads = config["num_attention_heads"]
    return dense_architecture(
        ModelSpec(
            family="qwen2",
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope=RopeSpec.from_hf(config),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=True,
            init_std=config.get("initializer_range", 0.02),
        )
    )
