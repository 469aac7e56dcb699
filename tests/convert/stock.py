"""Megatron-core's own GPT model and loader, built as a Megatron-LM user would without Transformer Engine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextmanager
def may_have_children() -> Iterator[None]:
    """Allow Megatron's saves to start processes, which the tests' daemonic ranks may not; they end here."""
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


def logits_and_save(context: Any, checkpoint: str, token_ids: list[int], save_dir: str) -> np.ndarray:
    """Load ``checkpoint`` strictly, compute logits [n, V] of one sequence, and save the model again."""
    from megatron.core import dist_checkpointing

    model = _build(checkpoint)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
    model.load_state_dict(state["model"])
    with may_have_children():
        dist_checkpointing.save({"model": model.sharded_state_dict()}, save_dir, async_sharded_save=False)
    n = len(token_ids)
    mask = torch.ones(n, n, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        out = model.eval()(torch.tensor([token_ids]), torch.arange(n)[None], mask)
    return out[0].float().numpy()


def _build(checkpoint: str) -> Any:
    """The model that the arguments in the checkpoint describe, as --use-checkpoint-args takes them."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    args = torch.load(Path(checkpoint) / "common.pt", weights_only=False)["args"]
    moe: dict[str, Any] = {}
    if args.num_experts is not None:
        moe = {
            "num_moe_experts": args.num_experts,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_router_topk": args.moe_router_topk,
            "moe_router_pre_softmax": args.moe_router_pre_softmax,
            "moe_router_score_function": args.moe_router_score_function,
            "moe_router_enable_expert_bias": args.moe_router_enable_expert_bias,
            "moe_router_topk_scaling_factor": args.moe_router_topk_scaling_factor,
            "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
            "moe_layer_freq": args.moe_layer_freq,
            "moe_router_load_balancing_type": "none",
        }
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
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
        layers = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
    return GPTModel(
        config,
        layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )
