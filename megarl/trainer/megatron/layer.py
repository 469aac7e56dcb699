"""Megatron's transformer layer with MegaRL's routing and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_layer import TransformerLayer

from megarl.trainer.megatron.experts import PaddedAllGather
from megarl.trainer.megatron.router import PolicyRouter


class PolicyLayer(TransformerLayer):
    """Passes the microbatch to its router; its dispatcher accepts ranks with different numbers of tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.mlp, MoELayer) and self.config.expert_dispatcher == "allgather":
            self.mlp.token_dispatcher = PaddedAllGather(
                self.mlp.num_local_experts,
                self.mlp.local_expert_indices,
                config=self.config,
                pg_collection=get_default_pg_collection(),
            )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """See TransformerLayer."""
        router = getattr(self.mlp, "router", None)
        if isinstance(router, PolicyRouter):
            router.microbatch = getattr(kwargs.get("packed_seq_params"), "routing", None)
        hidden, context = super().forward(*args, **kwargs)
        return hidden, context
