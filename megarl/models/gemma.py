"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786).

Norms are before and after attention and MLP. Hugging Face and vLLM both store their weights minus one (the
norm multiplies by 1 + weight), so the table copies them unchanged.
"""

from __future__ import annotations

from typing import Any

from megarl.errors import UserError
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec, RopeSpec
from megarl.models.table import Architecture

_NOT_TRAINABLE = "norms after attention and MLP, soft caps and sliding windows are not in the trainer"


def gemma2(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: gemma2``."""
    return _architecture("gemma2", config, RopeSpec.from_hf(config), qk_norm=False)


def gemma3_text(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: gemma3_text``; its RoPE is that of the full-attention layers."""
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:
        rope = rope["full_attention"]
    spec = RopeSpec.from_hf(config | {"rope_parameters": rope}, default_theta=1_000_000.0)
    return _architecture("gemma3_text", config, spec, qk_norm=True)


def _architecture(family: str, config: dict[str, Any], rope: RopeSpec, qk_norm: bool) -> Architecture:
    if not config.get("tie_word_embeddings", True):
        raise UserError(f"config.json: an untied head is not supported for {family}")
    bias = bool(config.get("attention_bias", False))
    return dense_architecture(
        ModelSpec.from_hf(
            family,
            config,
            head_dim=config["head_dim"],
            rope=rope,
            tied_embeddings=True,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=qk_norm,
            sandwich_norms=True,
            not_trainable=_NOT_TRAINABLE,
        )
    )
