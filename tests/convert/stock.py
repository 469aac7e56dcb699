"""Megatron-core's own GPT model and loader, built as a Megatron-LM user would without Transformer Engine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def may_have_children() -> Iterator[None]:
    """Megatron's own saves start processes, which the tests' daemonic ranks may not; they end here."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon, config["daemon"] = config["daemon"], False
    try:
        yield
    finally:
        config["daemon"] = daemon
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()
        filesystem_async._results_queue = None  # its process is gone


def logits_and_save(
    context: Any, checkpoint: str, model_dir: str, token_ids: list[int], save_dir: str
) -> np.ndarray:
    """Load ``checkpoint`` strictly, compute logits [n, V] of one sequence, and save the model again."""
    from megatron.core import dist_checkpointing

    model = _build(model_dir)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
    model.load_state_dict(state["model"])
    with may_have_children():
        dist_checkpointing.save({"model": model.sharded_state_dict()}, save_dir, async_sharded_save=False)
    n = len(token_ids)
    mask = torch.ones(n, n, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        out = model.eval()(torch.tensor([token_ids]), torch.arange(n)[None], mask)
    return out[0].float().numpy()


def _build(model_dir: str) -> Any:
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megarl.models import load_architecture

    spec = load_architecture(model_dir).spec
    moe: dict[str, Any] = {}
    if spec.moe is not None:
        moe = {
            "num_moe_experts": spec.moe.num_experts,
            "moe_ffn_hidden_size": spec.moe.intermediate_size,
            "moe_router_topk": spec.moe.experts_per_token,
            "moe_router_pre_softmax": not spec.moe.normalize_top_k,
            "moe_layer_freq": [int(n in spec.moe.layers) for n in range(spec.num_layers)]
            if spec.dense_layers
            else 1,
            "moe_router_load_balancing_type": "none",
        }
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **moe,
    )
    if moe:
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    else:
        layers = get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    return GPTModel(
        config,
        layers,
        vocab_size=-(-spec.vocab_size // 128) * 128,
        max_sequence_length=spec.max_position_embeddings,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope.theta,
    )
