"""Context-parallel attention by Transformer Engine: keys and values pass from rank to rank in a ring.

The alternative to context_attention.py, which gathers them. Transformer Engine's ring (Ring Attention with
blockwise transformers, Liu et al. 2023, arXiv:2310.01889) overlaps the exchange with the attention of the
keys already received, and keeps at most two ranks' keys at a time; it runs on GPUs only. It expects the same
zigzag chunks of each packed sequence. Written against Megatron-Core's wrapper of it; tests replace that
wrapper, and it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from megarl.errors import UserError
from megarl.models.spec import ModelSpec
from megarl.trainer.megatron.attention import PackedAttention, PackedMicrobatch


def check_ring(spec: ModelSpec) -> None:
    """Raise UserError for a model without support for ring attention."""
    if spec.mla is not None:
        raise UserError(
            f"parallel.context_attention: ring: {spec.family} has latent attention, for which there is only "
            "all_gather"
        )


class RingAttention(PackedAttention):
    """Core attention: rotary embedding here, the rest in Transformer Engine."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        pg_collection: ProcessGroupCollection | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, pg_collection=pg_collection)
        self._left_ring = False
        # Imported here: the module requires Transformer Engine.
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.ring = TEDotProductAttention(
            config,
            layer_number,
            AttnMaskType.padding_causal,
            attention_type,
            softmax_scale=self.scale,
            cp_comm_type="p2p",
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedMicrobatch
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d], this rank's -> [T, heads, d]."""
        assert packed.prefixes is None, "packing.share_prefix is rejected with a ring"
        alone = {} if packed.split else {"local_cp_size": 1}  # no group: attention of this rank's own tokens
        if packed.split and self._left_ring:  # the wrapper remembers the last microbatch's group
            alone = {"cp_group": self.context_group, "local_cp_size": self.context_group.size()}
        self._left_ring = not packed.split
        # Padding follows each sequence, where causal attention does not look: it counts as tokens.
        whole = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_kv=packed.cu_seqlens_kv,
            cu_seqlens_q_padded=packed.cu_seqlens_q,
            cu_seqlens_kv_padded=packed.cu_seqlens_kv,
            max_seqlen_q=max(packed.lengths),
            max_seqlen_kv=max(packed.lengths),
            **alone,
        )
        out: torch.Tensor = self.ring(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            None,
            AttnMaskType.padding_causal,
            packed_seq_params=whole,
        )
        return out.view(query.shape)
