"""A Megatron GPTModel built from an architecture's spec, ending in hidden states instead of logits.

The losses apply the language-model head (megarl/ops/linear_token_logprob.py) to the rows that have a loss, so
logits of prompt tokens, and the full [T, V] matrix, are never computed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megarl.config.parallel import ParallelConfig
from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.rope import inverse_frequencies
from megarl.models.spec import ModelSpec
from megarl.trainer.megatron.activation import SwiGlu
from megarl.trainer.megatron.attention import FlatQkvSelfAttention, PackedAttention
from megarl.trainer.megatron.experts import StackedExperts
from megarl.trainer.megatron.latent_attention import LatentAttention, LatentAttentionSubmodules
from megarl.trainer.megatron.layer import PolicyLayer
from megarl.trainer.megatron.norm import RmsNorm
from megarl.trainer.megatron.ring_attention import RingAttention, check_ring
from megarl.trainer.megatron.router import PolicyRouter


class _BiasedColumnParallelLinear(ColumnParallelLinear):
    """Megatron has one switch for all biases; models differ by layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


class _BiasedRowParallelLinear(RowParallelLinear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": True}))


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns hidden states [T, 1, H] (after the final norm)."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """Return the head's rows owned by this tensor rank, without padding rows: [V_local, H]."""
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight[: self.real_vocab_rows(weight.shape[0])]

    def real_vocab_rows(self, local_rows: int) -> int:
        """Return the number of local rows that are real vocabulary."""
        start = parallel_state.get_tensor_model_parallel_rank() * local_rows
        return max(0, min(local_rows, int(self.config.real_vocab_size) - start))


class ScoreModel(PolicyModel):
    """A PolicyModel with a head ``score`` [1, H]; megarl.trainer.outputs applies it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = None
            self.score = torch.nn.Linear(self.config.hidden_size, 1, bias=False)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Like other Megatron modules; its language models require an output layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
    recompute: Literal["off", "selective", "full"] = "off",
    dispatcher: Literal["alltoall", "allgather"] = "alltoall",
) -> TransformerConfig:
    """Return Megatron's configuration for this model and layout."""
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # Megatron's switch for an activation module: SwiGlu
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spec.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        # On gloo, batched p2p silently mixes up the messages of virtual stages.
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        moe_token_dispatcher_type="alltoall",  # allgather rejects variable lengths; see layer.py
        **_moe_options(spec),
        **_RECOMPUTE[recompute],
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # weights come from a checkpoint
        calculate_per_token_loss=True,  # losses carry their global denominators already
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Interleaved stages free an output while it is being sent. A CUDA stream keeps the memory until
        # then; gloo does not, and its thread would read other data.
        deallocate_pipeline_outputs=layout.pipeline > 1 and (layout.virtual == 1 or device.type == "cuda"),
    )
    config.rope_inverse_frequencies = inverse_frequencies(spec.rope, spec.rope_dim).to(device)
    config.rope_attention_factor = spec.rope.attention_factor
    config.unrotated_layers = spec.unrotated_layers
    config.moe_spec = spec.moe
    config.expert_dispatcher = dispatcher
    config.real_vocab_size = spec.vocab_size
    return config


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "off": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,  # keeps one layer's input each: the smallest peak
    },
}


def _moe_options(spec: ModelSpec) -> dict[str, Any]:
    moe = spec.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size or None,
        "moe_layer_freq": [int(n in moe.layers) for n in range(spec.num_layers)] if spec.dense_layers else 1,
        "moe_router_topk": moe.experts_per_token,  # router.py has the other routing options
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def layer_spec(spec: ModelSpec, layer: int, core_attention: type = PackedAttention) -> ModuleSpec:
    """Return MegaRL's transformer layer: Megatron's modules with MegaRL's attention, norms and experts."""
    return ModuleSpec(
        module=PolicyLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RmsNorm,
            self_attention=_attention_spec(spec, core_attention),
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=RmsNorm,
            mlp=_mlp_spec(spec, layer),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(spec: ModelSpec, core_attention: type) -> ModuleSpec:
    if spec.mla is not None:
        return ModuleSpec(module=LatentAttention, submodules=LatentAttentionSubmodules(spec.mla))
    qk_norm = RmsNorm if spec.qk_norm else None
    return ModuleSpec(
        module=FlatQkvSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=_BiasedRowParallelLinear if spec.output_bias else RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _mlp_spec(spec: ModelSpec, layer: int) -> ModuleSpec:
    column = _BiasedColumnParallelLinear if spec.mlp_bias else ColumnParallelLinear
    row = _BiasedRowParallelLinear if spec.mlp_bias else RowParallelLinear
    dense = MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGlu)
    if layer in spec.dense_layers:
        return ModuleSpec(module=MLP, submodules=dense)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=StackedExperts),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=dense),
            router=PolicyRouter,
        ),
    )


def build_model(
    spec: ModelSpec,
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
    chunk: int = 0,
    *,
    recompute: Literal["off", "selective", "full"] = "off",
    dispatcher: Literal["alltoall", "allgather"] = "alltoall",
    context_attention: Literal["all_gather", "ring"] = "all_gather",
) -> PolicyModel:
    """Build this rank's part of the model, uninitialised; fill it with megarl.weights.hf.load_hf.

    With virtual pipeline stages it is one of this rank's ``layout.virtual`` chunks.

    Raises:
        UserError: the architecture cannot be trained yet, or ring attention is not available here.
    """
    if spec.not_trainable is not None:
        raise UserError(f"model.path: training {spec.family} is not supported: {spec.not_trainable}")
    core_attention: type = PackedAttention
    if context_attention == "ring":
        check_ring(spec)
        core_attention = RingAttention
    config = transformer_config(spec, layout, dtype, device, recompute, dispatcher)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    virtual = {"ignore_virtual": False, "vp_stage": chunk}
    first = parallel_state.is_pipeline_first_stage(**virtual)
    last = parallel_state.is_pipeline_last_stage(**virtual)
    layers = [layer_spec(spec, n, core_attention) for n in layout.stage_layers(spec.num_layers, stage, chunk)]
    model = (ScoreModel if spec.score_head else PolicyModel)(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RmsNorm),
        vocab_size=spec.padded_vocab(layout.tensor),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        vp_stage=chunk if layout.virtual > 1 else None,
        position_embedding_type="none",  # MegaRL's attention applies RoPE by position ids
    )
    _mark_tensor_parallel(model)
    return model.to(dtype=dtype, device=device)


def build_chunks(
    spec: ModelSpec,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> list[PolicyModel]:
    """Build all of this rank's chunks (:func:`build_model`)."""
    return [
        build_model(
            spec,
            layout,
            dtype,
            device,
            chunk,
            recompute=parallel.activation_recompute,
            dispatcher=parallel.expert_dispatcher,
            context_attention=parallel.context_attention,
        )
        for chunk in range(layout.virtual)
    ]


def named_parameters(chunks: list[PolicyModel]) -> dict[str, torch.nn.Parameter]:
    """Return every parameter by its name in the architecture table."""
    return {
        f"chunk{number}.{name}" if len(chunks) > 1 else name: param
        for number, chunk in enumerate(chunks)
        for name, param in chunk.named_parameters()
    }


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark the weights sharded over tensor ranks; Megatron does so in its initialisation, which is skipped.

    Without the mark a rank's shard counts as a replica, and the gradient norm has only the first rank's.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)):
            weight, dim = module.weight, int(isinstance(module, RowParallelLinear))
            if weight is not None and not getattr(weight, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(weight, True, dim, 1)


def is_first_replica(param: str, at: RankCoordinates) -> bool:
    """Return True if the rank is the first of those with the same values of ``param``."""
    if param.endswith((".experts.w13", ".experts.w2")):
        return at.expert_data == 0
    return at.data == 0 and at.context == 0
