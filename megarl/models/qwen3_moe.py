"""Qwen3-MoE: Qwen3's attention, experts in most layers, softmax router."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import attention, dense_mlp, ends
from megarl.models.moe import moe_mlp
from megarl.models.spec import ModelSpec, MoeSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: qwen3_moe``."""
    bias = bool(config.get("attention_bias", False))
    num_layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    moe = MoeSpec(
        num_experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        layers=tuple(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0),
        normalize_top_k=bool(config.get("norm_topk_prob", False)),
        aux_loss_coef=config.get("router_aux_loss_coef", 0.0),
    )
    spec = ModelSpec.from_hf(
        "qwen3_moe",
        config,
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        moe=moe,
    )
    return Architecture(spec, (*ends(spec), *attention(spec), *dense_mlp(spec), *moe_mlp(spec)))
