"""MegaRL's attention inside Megatron's transformer layer.

It differs from Megatron's in two ways: the q|k|v projection is stored flat, as in the engine (so the engine
can alias it), and the core attention works on packed (THD) sequences on any device, with context parallelism
by all-gathering K and V. Rotary embedding is applied here, from the microbatch's position ids, in one
vectorised step for all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from megarl.models.rope import cos_sin, rotate
from megarl.records import PackedBatch
from megarl.trainer.megatron.context_attention import context_parallel_attention
from megarl.trainer.megatron.router import Routing
from megarl.trainer.packed_attention import PackedRow, packed_causal_attention, prefix_spans


@dataclass
class PackedMicrobatch(PackedSeqParams, PackedRow):
    """Megatron's packed-sequence parameters plus values that every layer would otherwise recompute.

    ``lengths`` are the padded lengths of the sequences over all context-parallel ranks; ``position_ids`` [T
    local] are those of this rank's tokens. ``prefixes`` gives, for each sequence that continues another one,
    that one's tokens [start, stop) in the packed row over all ranks. Without ``split`` the row is this rank's
    alone, and no keys are gathered from other ranks.
    """

    position_ids: torch.Tensor | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [T, 1, head_dim]
    routing: Routing | None = None
    split: bool = True  # over the context-parallel ranks, if there are several

    @classmethod
    def of(cls, batch: PackedBatch, routing: Routing | None) -> PackedMicrobatch:
        """Collect what the layers need of ``batch``."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            lengths=batch.cu_seqlens.diff().tolist(),
            position_ids=batch.position_ids,
            prefixes=prefix_spans(batch),
            routing=routing,
            split=batch.split,
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: PackedMicrobatch,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal attention within each sequence, over the context-parallel ranks of ``group`` if they share it.

    q [T, heads, d], k [T, kv_heads, d] and v [T, kv_heads, w] with w <= d -> [T, heads, w].
    """
    width = v.shape[-1]
    if width < q.shape[-1]:  # the fast kernels need equal head sizes; zero-padding the values changes nothing
        v = F.pad(v, (0, q.shape[-1] - width))
    if packed.split and group.size() > 1:
        out = context_parallel_attention(q, k, v, packed.lengths, packed.prefixes, scale, group)
    else:
        out = packed_causal_attention(q, k, v, packed, scale)
    return out[..., :width]


class PackedAttention(MegatronModule):
    """Core attention for packed microbatches: rotary embedding, then causal attention per sequence."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.rotates = layer_number - 1 not in config.unrotated_layers

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedMicrobatch | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]."""
        packed = packed_seq_params
        assert isinstance(packed, PackedMicrobatch), "MegaRL's attention works on packed microbatches only"
        if packed.rope is None:
            assert packed.position_ids is not None
            packed.rope = cos_sin(
                self.config.rope_inverse_frequencies, packed.position_ids, self.config.rope_attention_factor
            )
        if self.rotates:
            query, key = rotate(query, *packed.rope), rotate(key, *packed.rope)
        return self.attend(query, key, value, packed).reshape(query.shape[0], -1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedMicrobatch
    ) -> torch.Tensor:
        """Rotated query [T, heads, d] and key, and value [T, kv_heads, d] -> [T, heads, d]."""
        return attend(query, key, value, packed, self.scale, self.context_group)


class FlatQkvSelfAttention(SelfAttention):
    """Self-attention whose fused projection is q | k | v on each tensor rank, not interleaved by group."""

    def _sizes(self) -> list[int]:
        head = self.hidden_size_per_attention_head
        q = self.num_attention_heads_per_partition * head
        kv = self.num_query_groups_per_partition * head
        return [q, kv, kv]

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, 1, H] -> query [T, 1, heads, d], key and value [T, 1, kv_heads, d]."""
        assert split_qkv
        assert not output_gate
        assert key_value_states is None
        mixed, _ = self.linear_qkv(hidden_states)
        query, key, value = (
            part.unflatten(-1, (-1, self.hidden_size_per_attention_head))
            for part in mixed.split(self._sizes(), dim=-1)
        )
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Checkpoint q, k and v as three tensors, so another tensor-parallel size can read them."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for kind in ("weight", "bias"):
            name = f"{prefix}linear_qkv.{kind}"
            if name in state:
                state[name] = _split_for_checkpoint(state[name], self._sizes(), sharded_offsets)
        return dict(state)


def _split_for_checkpoint(
    whole: ShardedTensor, sizes: list[int], sharded_offsets: tuple[Any, ...]
) -> ShardedTensorFactory:
    prepended = len(sharded_offsets)
    local_rows = whole.local_shape[0]
    rank = whole.global_offset[prepended] // local_rows
    ranks = whole.axis_fragmentations[prepended]

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        assert flattened_range is None
        return [
            ShardedTensor.from_rank_offsets(
                f"{key}.{name}",
                part,
                *sharded_offsets,
                (prepended, rank, ranks),
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )
            for name, part in zip("qkv", tensor.split(sizes), strict=True)
        ]

    def merge(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)
