"""Tiny Hugging Face checkpoints with every option of the families, and what HF computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 250  # no multiple of 64: stored embeddings have padding rows
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-biases-llama3": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, **BIASES},
    ),
    "llama-biases": ("llama", {"tie_word_embeddings": False, **BIASES}),
    "llama-linear-rope-mha": (
        "llama",
        {"rope_parameters": LINEAR_ROPE, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "llama-deep-tied": ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "smollm3": ("smollm3", {"tie_word_embeddings": False, "num_hidden_layers": 4, "pad_token_id": 0}),
    "smollm3-tied-biases": (
        "smollm3",
        {"no_rope_layers": [0, 1], "pad_token_id": 0, **BIASES},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "qwen3-moe": ("qwen3_moe", {"tie_word_embeddings": False, "head_dim": 32, **EXPERTS}),
    "qwen3-moe-mixed-tied": (
        "qwen3_moe",
        {"tie_word_embeddings": True, **EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN_ROPE | {"attention_factor": 0.9}, "head_dim": 32}),
    "deepseek-v3": (
        "deepseek_v3",
        LATENT | {"q_lora_rank": 40, "rope_parameters": YARN_ROPE | {"mscale": 0.8, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-plain": (
        "deepseek_v3",
        LATENT | {"q_lora_rank": None, "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
}


def make_model(name: str, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in fp32 whose biases and norms are no longer 0 and 1."""
    family, options = MODELS[name]
    config_class, model_class = _CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(SIZES | options))).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model


def save_model(name: str, directory: Path, *, seed: int = 0) -> transformers.PreTrainedModel:
    """Write ``make_model(name)`` to ``directory``."""
    model = make_model(name, seed=seed)
    model.save_pretrained(directory)
    return model


def hf_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Logits [n, V] of one sequence alone."""
    return model(torch.tensor([token_ids])).logits[0]


def hf_logprobs(model: transformers.PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Log-probability [n - 1] of tokens 1, 2, ... given those before."""
    logprobs = hf_logits(model, token_ids)[:-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
