"""Keys of config.json: which are read, which have no effect, which values are errors.

transformers fills in missing keys and ignores unknown ones; other readers, such as vLLM, know more keys. So
any value that would change the computation in one of them and is not supported is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megarl.errors import UserError
from megarl.models.quantization import quantization_problem

_EVERYWHERE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_theta"
    " rope_scaling initializer_range"
)
# Keys that the table of a family reads, besides the common ones.
READ: dict[str, frozenset[str]] = {
    family: frozenset(f"{_EVERYWHERE} {own}".split())
    for family, own in {
        "llama": "attention_bias mlp_bias",
        "mistral": "sliding_window",
        "qwen2": "",
        "qwen3": "attention_bias",
        "qwen3_moe": "attention_bias num_experts num_local_experts num_experts_per_tok moe_intermediate_size"
        " norm_topk_prob decoder_sparse_step mlp_only_layers router_aux_loss_coef",
        "mixtral": "num_experts num_local_experts num_experts_per_tok router_aux_loss_coef",
        "deepseek_v3": "n_routed_experts num_local_experts num_experts_per_tok moe_intermediate_size"
        " n_shared_experts first_k_dense_replace n_group topk_group norm_topk_prob routed_scaling_factor"
        " kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_nextn_predict_layers"
        " num_mtp_layers",
        "smollm3": "attention_bias mlp_bias no_rope_layers no_rope_layer_interval",
        "gemma2": "attention_bias",
        "gemma3_text": "attention_bias",
    }.items()
}
# Keys without effect on logits: generation, loss, execution, documentation.
_HARMLESS = (
    "architectures auto_map bos_token_id eos_token_id pad_token_id dtype torch_dtype id2label label2id"
    " max_window_layers model_type name_or_path _name_or_path num_labels output_attentions use_cache"
    " output_hidden_states output_router_logits pretraining_tp problem_type return_dict qk_head_dim"
    " transformers_version ep_size"
)
HARMLESS = frozenset(_HARMLESS.split())
# Keys of families that are only converted: nothing is computed with them, and no weights depend on them.
_GEMMA = {
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "_sliding_window_pattern",
    "sliding_window_pattern",
    "rope_local_base_freq",
}
NOT_COMPUTED: dict[str, set[str]] = {"gemma2": _GEMMA, "gemma3_text": _GEMMA}

# Values that match what is built; any other is an error. null counts as missing.
_SILU = ("silu", "swish")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": _SILU,
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,),
    "attention_probs_dropout_prob": (0,),
    "residual_dropout": (0,),
    "resid_pdrop": (0,),
    "embd_pdrop": (0,),
    "router_jitter_noise": (0,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "quantization_config": (),
    "compression_config": (),
    "sliding_window": (),
    "attention_chunk_size": (),
    "interleaved_sliding_window": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_pct": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "attention_scale": (),
    "attn_temperature_tuning": (False, 0),
    "attention_sink": (False,),
    "add_swa_attention_sink_bias": (False,),
    "add_full_attention_sink_bias": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "layer_types": (),
    "mlp_layer_types": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "rope_interleave": (True,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "routed_scaling_factor": (1,),
    "shared_expert_intermediate_size": (0,),
    "n_shared_experts": (0,),
    "index_topk": (),
    "layernorm_type": ("rms",),
    "norm_type": ("rms",),
}
# Further neutral values by family.
_FAMILY_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2": {"attention_bias": (True, False), "qkv_bias": (True,)},  # biases on q, k, v, whatever it says
    "qwen3": {"use_qk_norm": (True,), "qk_layernorm": (True,)},
    "qwen3_moe": {"use_qk_norm": (True,), "qk_layernorm": (True,), "scoring_func": ("softmax",)},
    "mixtral": {"scoring_func": ("softmax",)},
    "gemma2": {"hidden_act": ("gelu_pytorch_tanh", "gelu")},  # replaced by hidden_activation, and not read
    "gemma3_text": {"hidden_act": ("gelu_pytorch_tanh", "gelu")},
}
# Older and newer names of one key.
_ALIASES: dict[str, dict[str, str]] = {
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
}
# Defaults of transformers for missing keys; other sizes are required.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.001,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
    },
    "deepseek_v3": {
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "num_nextn_predict_layers": 1,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
    },
    "gemma2": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}

_ROPE = (
    "rope_type type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings"
    " beta_fast beta_slow mscale mscale_all_dim attention_factor truncate partial_rotary_factor finetuned"
)
_ROPE_KEYS = frozenset(_ROPE.split())
_ROPES_BY_LAYER = frozenset(("full_attention", "sliding_attention"))


def with_defaults(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with transformers' defaults for missing keys."""
    aliases = _ALIASES.get(family, {})
    renamed = {new: config[old] for old, new in aliases.items() if old in config and new not in config}
    return DEFAULTS[family] | config | renamed


def check_options(family: str, config: dict[str, Any]) -> None:
    """Raise an error for every unsupported value.

    Raises:
        UserError: one line per unsupported value.
    """
    if problems := list(_problems(family, config)):
        raise UserError("\n".join(f"config.json: {problem}" for problem in problems))


# Sizes: what each may be, null meaning that it is missing. The bounds are beyond any model there is.
_COUNTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(["hidden_size", "intermediate_size", "moe_intermediate_size"], (1, 2**24)),
    **dict.fromkeys(["vocab_size", "max_position_embeddings"], (1, 2**31 - 1)),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank"], (1, 2**20)),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"], (1, 2**20)),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"], (1, 2**16)
    ),
    **dict.fromkeys(["n_group", "topk_group", "decoder_sparse_step"], (1, 2**16)),
    "num_hidden_layers": (1, 10_000),
    **dict.fromkeys(["n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"], (0, 10_000)),
    "num_mtp_layers": (0, 10_000),
}
_POSITIVE = ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"]
_ROPE_POSITIVE = [
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
]
_MOST = 1e30


def _size_problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield errors for invalid sizes."""
    for key, (least, most) in _COUNTS.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not least <= value <= most):
            yield f"{key} must be a whole number from {least} to {most} (got {value!r})"
    for key in _POSITIVE:
        if (value := config.get(key)) is not None and not _is_positive(value):
            yield f"{key} must be a number above 0 (got {value!r})"
    if (value := config.get("tie_word_embeddings")) is not None and not isinstance(value, bool):
        yield f"tie_word_embeddings must be true or false (got {value!r})"


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _MOST


def _problems(family: str, config: dict[str, Any]) -> Iterator[str]:
    own = _FAMILY_NEUTRAL.get(family, {})
    for key, value in config.items():
        if key in READ[family] or key in NOT_COMPUTED.get(family, ()) or key not in NEUTRAL or value is None:
            continue
        if key == "quantization_config":
            if (problem := quantization_problem(config)) is not None:
                yield problem
        elif key == "layer_types":
            if not isinstance(value, list) or any(each != "full_attention" for each in value) or not value:
                yield f"layer_types is not supported for {family} but for full_attention (got {value!r})"
        elif key == "sliding_window" and family.startswith(("qwen", "smollm3")):
            continue  # counts with use_sliding_window alone
        elif value not in (allowed := own.get(key, NEUTRAL[key])):
            built = f"; built is {allowed[0]!r}" if allowed else ""
            yield f"{key} {value!r} is not supported for {family}{built}"
    yield from _size_problems(config)
    yield from _rope_problems(config)


def _rope_problems(config: dict[str, Any]) -> Iterator[str]:
    for section in ("rope_parameters", "rope_scaling"):
        rope = config.get(section)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            yield f"{section} must be an object (got {rope!r})"
            continue
        parts = [part for name, part in rope.items() if name in _ROPES_BY_LAYER and isinstance(part, dict)]
        for part in parts or [rope]:
            for key, value in part.items():
                if key not in _ROPE_KEYS:
                    yield f"{section}.{key} is not supported (known: {', '.join(sorted(_ROPE_KEYS))})"
                elif key in _ROPE_POSITIVE and value is not None and not _is_positive(value):
                    yield f"{section}.{key} must be a number above 0 (got {value!r})"
                elif key == "partial_rotary_factor" and value not in (None, 1):
                    yield f"{section}.partial_rotary_factor {value!r} is not supported; built is 1"
