"""Mixtral: Llama's attention, experts in every layer, softmax router."""

from __future__ import annotations

from typing import Any

from megarl.models.dense import attention, ends
from megarl.models.moe import MoeNames, moe_mlp
from megarl.models.spec import ModelSpec, MoeSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: mixtral``."""
    moe = MoeSpec(
        num_experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        layers=tuple(range(config["num_hidden_layers"])),
        aux_loss_coef=config.get("router_aux_loss_coef", 0.0),
    )
    spec = ModelSpec.from_hf("mixtral", config, moe=moe)
    names = MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
    return Architecture(spec, (*ends(spec), *attention(spec), *moe_mlp(spec, names)))
