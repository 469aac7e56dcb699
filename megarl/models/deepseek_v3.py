"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, sigmoid router with a bias, shared experts."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import dense_mlp, ends
from megarl.models.mla import latent_attention
from megarl.models.moe import moe_mlp
from megarl.models.spec import MlaSpec, ModelSpec, MoeSpec, RopeSpec, yarn_scale
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: deepseek_v3``.

    Layers of multi-token prediction, which follow the model's layers in a checkpoint, are ignored: neither
    trainer nor engine has parameters for them.
    """
    num_layers = config["num_hidden_layers"]
    dense = config["first_k_dense_replace"] or 0
    inner = config["moe_intermediate_size"]
    moe = MoeSpec(
        num_experts=config["n_routed_experts"],
        experts_per_token=config["num_experts_per_tok"],
        intermediate_size=inner,
        layers=tuple(n for n in range(num_layers) if n >= dense),
        score="sigmoid",
        normalize_top_k=bool(config.get("norm_topk_prob", True)),
        scaling_factor=config["routed_scaling_factor"],
        num_groups=config["n_group"] or 1,
        top_groups=config["topk_group"] or 1,
        router_bias=True,
        shared_intermediate_size=inner * (config["n_shared_experts"] or 0),
    )
    rope = RopeSpec.from_hf(config)
    scale = yarn_scale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    mla = MlaSpec(
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        logit_scale=scale**2,
    )
    spec = ModelSpec.from_hf(
        "deepseek_v3",
        config,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        rope=rope,
        moe=moe,
        mla=mla,
    )
    further = range(num_layers, num_layers + (config["num_nextn_predict_layers"] or 0))
    return Architecture(
        spec,
        (*ends(spec), *latent_attention(spec), *dense_mlp(spec), *moe_mlp(spec)),
        ignored=tuple(f"model.layers.{layer}." for layer in further),
    )
