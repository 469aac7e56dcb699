"""A rank's experts as two stacked parameters, laid out as the engine lays them out.

Megatron's own expert modules keep one matrix per expert or need kernels that exist on GPUs only;
stacked, the engine's parameter can be the trainer's memory, and a layer of 256 experts is two
parameters instead of 512.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.trainer.megatron.fused import swiglu


class StackedExperts(MegatronModule):
    """Gated experts: w13 [E_local, 2I, H] (gate rows above up rows) and w2 [E_local, H, I].

    Takes and returns tokens sorted by expert, as Megatron's token dispatchers deliver them.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        assert pg_collection.expt_tp.size() == 1, "experts are not split over tensor ranks"
        self.num_local_experts = num_local_experts
        self._ep_group, self._expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.w13 = torch.nn.Parameter(
            torch.empty(num_local_experts, 2 * inner, hidden, dtype=config.params_dtype)
        )
        self.w2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=config.params_dtype))
        for param in (self.w13, self.w2):
            # Reduced over the ranks that hold the same experts, not over all data-parallel ranks. Also with
            # one expert rank: so checkpoints have the same two optimizers under every layout.
            param.allreduce = False  # type: ignore[attr-defined]
            # No copy of the first tensor rank's: the gradient norm counts every rank's experts.
            set_tensor_model_parallel_attributes(param, True, 0, 1)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Each expert's MLP on its share of ``tokens`` [N, H], scaled by ``probs`` [N]; no bias."""
        counts = tokens_per_expert.tolist()
        outputs = []
        for expert, (part, scale) in enumerate(zip(tokens.split(counts), probs.split(counts), strict=True)):
            inner = swiglu(torch.nn.functional.linear(part, self.w13[expert])) * scale[:, None]
            outputs.append(torch.nn.functional.linear(inner.to(part.dtype), self.w2[expert]))
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One tensor per parameter over all layers and experts, so that any expert split can load it."""
        axis = len(sharded_offsets)
        experts = (axis, self._ep_group.rank(), self._ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                param,
                *sharded_offsets,
                experts,
                replica_id=(0, 0, self._expt_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, param in (("w13", self.w13), ("w2", self.w2))
        }
