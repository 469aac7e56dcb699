"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) inside Megatron's layer.

Keys and values are expanded from their latent before the attention, which is then MegaRL's packed one
(attention.py): with packing, shared prefixes and context parallelism like any other model. The two
down-projections are replicated on every tensor rank, as in the engine; the up-projections from the latents
are split by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.models.rope import cos_sin, pair_halves, rotate
from megarl.models.spec import MlaSpec
from megarl.trainer.megatron.attention import PackedMicrobatch, attend
from megarl.trainer.megatron.norm import RmsNorm

_LATENT_NORM_EPS = 1e-6
"""Hugging Face's layers use this default, whatever config.json specifies for the other norms."""


class _WholeLinear(torch.nn.Module):
    """A projection replicated on every tensor rank; with sequence parallelism each sees its own tokens.

    Created without drawing random numbers, so ranks' random states stay equal whatever layers they have.
    """

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weight)


@dataclass
class LatentAttentionSubmodules:
    """Sizes of the latents and heads."""

    sizes: MlaSpec


class LatentAttention(MegatronModule):
    """Multi-head latent attention over packed microbatches."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,  # its name, since Megatron-Core 0.19
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.layer_number, self.sizes = layer_number, submodules.sizes
        self._tensor_group, self._context_group = pg_collection.tp, pg_collection.cp
        sizes, hidden, heads = self.sizes, config.hidden_size, config.num_attention_heads
        self._query_head = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        self.scale = self._query_head**-0.5 * sizes.logit_scale
        if sizes.q_lora_rank is None:
            self.linear_q_proj = self._by_head(hidden, heads * self._query_head)
        else:
            self.linear_q_down_proj = _WholeLinear(hidden, sizes.q_lora_rank, config)
            self.q_layernorm = RmsNorm(config, sizes.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.linear_q_up_proj = self._by_head(sizes.q_lora_rank, heads * self._query_head)
        down = sizes.kv_lora_rank + sizes.qk_rope_head_dim
        self.linear_kv_down_proj = _WholeLinear(hidden, down, config)
        self.kv_layernorm = RmsNorm(config, sizes.kv_lora_rank, eps=_LATENT_NORM_EPS)
        up = heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self.linear_kv_up_proj = self._by_head(sizes.kv_lora_rank, up)
        self.linear_proj = RowParallelLinear(
            heads * sizes.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self._tensor_group,
        )

    def _by_head(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            tp_group=self._tensor_group,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedMicrobatch | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden [T, 1, H] (a tensor rank's tokens with sequence parallelism) -> the same shape; no bias."""
        packed = packed_seq_params
        assert isinstance(packed, PackedMicrobatch), "MegaRL's attention works on packed microbatches only"
        if packed.rope is None:
            assert packed.position_ids is not None
            packed.rope = cos_sin(
                self.config.rope_inverse_frequencies, packed.position_ids, self.config.rope_attention_factor
            )
        query, key, value = self._heads(hidden_states, *packed.rope)

        def core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attend(query, key, value, packed, self.scale, self._context_group)

        if self.config.recompute_granularity == "selective" and self.training:
            out = checkpoint(core, False, query, key, value)
        else:
            out = core(query, key, value)
        output, _ = self.linear_proj(out.reshape(out.shape[0], 1, -1))
        return output, None

    def _heads(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this tensor rank's query and key [T, heads, nope + rope] and value [T, heads, v]."""
        sizes = self.sizes
        if sizes.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        latent, key_rope = self.linear_kv_down_proj(hidden).split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        expanded, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        # Every rank's heads use the rotary part of the key: its gradient is the sum over tensor ranks.
        if self.config.sequence_parallel:
            key_rope = gather_from_sequence_parallel_region(key_rope, group=self._tensor_group)
        else:
            key_rope = copy_to_tensor_model_parallel_region(key_rope, group=self._tensor_group)
        query = query[:, 0].unflatten(-1, (-1, self._query_head))
        key_nope, value = (
            expanded[:, 0]
            .unflatten(-1, (query.shape[1], -1))
            .split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        )
        query_nope, query_rope = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        query_rope = rotate(pair_halves(query_rope), cos, sin)
        key_rope = rotate(pair_halves(key_rope), cos, sin).expand(-1, query.shape[1], -1)
        return torch.cat((query_nope, query_rope), dim=-1), torch.cat((key_nope, key_rope), dim=-1), value
