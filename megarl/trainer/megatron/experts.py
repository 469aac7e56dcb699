"""A rank's experts as two stacked parameters, with the engine's layout.

Megatron's expert modules keep one matrix per expert or need kernels that exist on GPUs only; stacked, the
engine's parameter can alias the trainer's memory, and a layer of 256 experts is two parameters instead of
512.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.trainer.fused import swiglu


class StackedExperts(MegatronModule):
    """Gated experts: w13 [E_local, 2I, H] (gate rows above up rows) and w2 [E_local, H, I].

    Takes and returns tokens sorted by expert, as Megatron's token dispatchers deliver them. With
    expert-tensor parallelism, I is this rank's part of the inner size, and the dispatcher adds up the ranks'
    results.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # its name, since Megatron-Core 0.19
    ) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self._ep_group, self._expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self._tensor_group = pg_collection.expt_tp
        inner, hidden = config.moe_ffn_hidden_size // self._tensor_group.size(), config.hidden_size
        self.w13 = torch.nn.Parameter(
            torch.empty(num_local_experts, 2 * inner, hidden, dtype=config.params_dtype)
        )
        self.w2 = torch.nn.Parameter(torch.empty(num_local_experts, hidden, inner, dtype=config.params_dtype))
        for param in (self.w13, self.w2):
            # Reduced over the ranks that hold the same experts, not over all data-parallel ranks. Also with
            # one expert rank, so checkpoints have the same two optimizers under every layout.
            param.allreduce = False  # type: ignore[attr-defined]
            # Not a replica of the first tensor rank's: the gradient norm counts every rank's experts.
            set_tensor_model_parallel_attributes(param, True, 0, 1)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply each expert's MLP to its ``tokens`` [N, H], scaled by ``probs`` [N]; no bias."""
        counts = tokens_per_expert.tolist()
        linear = grouped_linear if uses_grouped_gemm(tokens) else looped_linear
        inner = swiglu(linear(tokens, self.w13, counts)) * probs[:, None]
        return linear(inner.to(tokens.dtype), self.w2, counts), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Save one tensor per parameter over all layers and experts, so any expert split can load it."""
        axis = len(sharded_offsets)
        experts = (axis, self._ep_group.rank(), self._ep_group.size())
        rank, ranks = self._tensor_group.rank(), self._tensor_group.size()
        replica_id = (0, 0, self._expt_dp_group.rank())

        def shard(key: str, part: torch.Tensor, inner: tuple[int, int, int]) -> ShardedTensor:
            # A single rank has the whole inner size: its tensors equal those without expert-tensor ranks.
            offsets = (*sharded_offsets, experts, *((inner,) if ranks > 1 else ()))
            return ShardedTensor.from_rank_offsets(
                key, part, *offsets, replica_id=replica_id, prepend_axis_num=axis
            )

        def build_w13(key: str, tensor: torch.Tensor, replica: Any, flattened: Any) -> list[ShardedTensor]:
            """Gate and up rows: two pieces of the global tensor, all gates above all ups."""
            assert flattened is None
            return [
                shard(key, part, (axis + 1, rank + half * ranks, 2 * ranks))
                for half, part in enumerate(tensor.chunk(2, dim=1))
            ]

        w13: Any = shard(f"{prefix}w13", self.w13, (0, 0, 1))
        if ranks > 1:
            w13 = ShardedTensorFactory(
                f"{prefix}w13", self.w13, build_w13, lambda parts: torch.cat(parts, dim=1), replica_id
            )
        return {
            f"{prefix}w13": w13,
            f"{prefix}w2": shard(f"{prefix}w2", self.w2, (axis + 2, rank, ranks)),
        }


def uses_grouped_gemm(tokens: torch.Tensor) -> bool:
    """Return True to run the experts in one kernel; torch's needs bfloat16, and is a loop on a CPU."""
    return tokens.device.type == "cuda" and tokens.dtype == torch.bfloat16


def grouped_linear(tokens: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """tokens [N, H], ``counts`` of them for each expert in turn, times weight [E, O, H] -> [N, O]."""
    ends = torch.tensor(counts, device=tokens.device).cumsum(0).to(torch.int32)
    out: torch.Tensor = torch.nn.functional.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
    return out


def looped_linear(tokens: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """See :func:`grouped_linear`; one expert after another."""
    parts = tokens.split(counts)
    return torch.cat([torch.nn.functional.linear(part, weight[expert]) for expert, part in enumerate(parts)])


class PaddedAllGather(MoEAllGatherTokenDispatcher):
    """Megatron's all-gathering dispatcher, with every rank's tokens padded to the maximum of all ranks.

    Padding chooses no expert, comes back as zeros and is cut off.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad [T, H], [T, E] and [T, E] before gathering."""
        hidden, probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        most = torch.tensor(hidden.shape[0], device=hidden.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.tp_ep_group)
        self._num_tokens = hidden.shape[0]
        rows = (0, 0, 0, int(most) - self._num_tokens)
        pad = torch.nn.functional.pad
        self.routing_map: torch.Tensor | None = pad(routing_map, rows)
        return pad(hidden, rows), pad(probs, rows)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Cut the padding off after scattering."""
        combined: torch.Tensor = super().combine_postprocess(hidden_states[: self._num_tokens])
        return combined
