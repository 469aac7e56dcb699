"""Sizes and options of a decoder-only transformer, read from its Hugging Face config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megarl.errors import UserError


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: base, and the parameters of linear, llama3 or yarn scaling.

    ``attention_factor`` multiplies cosine and sine (1 for all but yarn).
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: not given
    mscale_all_dim: float = 0.0
    attention_factor: float = 1.0

    @classmethod
    def from_hf(cls, config: dict[str, Any], default_theta: float = 10_000.0) -> RopeSpec:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (before)."""
        rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = float(rope.get("rope_theta", config.get("rope_theta", default_theta)))
        if not isinstance(kind, str) or kind not in ("default", "linear", "llama3", "yarn"):
            raise UserError(
                f"config.json: rope_type {kind!r} is not supported (default, linear, llama3, yarn)"
            )
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, "linear", factor=float(rope["factor"]))
        if kind == "yarn":
            return cls._yarn(theta, rope, config)
        return cls(
            theta,
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )

    @classmethod
    def _yarn(cls, theta: float, rope: dict[str, Any], config: dict[str, Any]) -> RopeSpec:
        """Read YaRN (arXiv:2309.00071); with DeepSeek's two scales the attention factor is their quotient."""
        if not rope.get("truncate", True):
            raise UserError("config.json: yarn with truncate false is not supported")
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        factor = float(rope["factor"])
        mscale, all_dim = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
        scale = rope.get("attention_factor")
        if scale is None and mscale and all_dim:
            scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
        elif scale is None:
            scale = yarn_scale(factor, 1.0)
        return cls(
            theta,
            "yarn",
            factor,
            original_max_position_embeddings=int(original),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=mscale,
            mscale_all_dim=all_dim,
            attention_factor=float(scale),
        )


def yarn_scale(factor: float, mscale: float) -> float:
    """Return YaRN's scale of the attention logits (arXiv:2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The mixture of experts in some or all layers.

    Scores are softmax or sigmoid of the router's fp32 logits. The ``experts_per_token`` best experts are
    selected (among the ``top_groups`` best of ``num_groups`` groups); their weights are optionally normalised
    to sum 1, then scaled by ``scaling_factor``. A router bias affects the selection, not the weights.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    layers: tuple[int, ...]  # global numbers of the layers with experts; the others are dense
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    router_bias: bool = False
    shared_intermediate_size: int = 0  # of all shared experts together; 0: none
    aux_loss_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): ranks of the latents, sizes per head."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    logit_scale: float = 1.0  # on top of 1 / sqrt(head): YaRN's, squared


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and options of a decoder. Sizes are in elements, not bytes."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeSpec
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # norms also after attention and after the MLP
    unrotated_layers: tuple[int, ...] = ()  # global numbers of the layers without rotary embedding
    not_trainable: str | None = (
        None  # reason why the trainer cannot build it; planning and conversion still work
    )
    init_std: float = 0.02
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    score_head: bool = False  # one number per token instead of logits (megarl/models/score.py)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Global numbers of the layers whose MLP is dense."""
        experts = set(self.moe.layers) if self.moe else set()
        return tuple(n for n in range(self.num_layers) if n not in experts)

    @classmethod
    def from_hf(cls, family: str, config: dict[str, Any], **differences: Any) -> ModelSpec:
        """Read the fields common to all families; ``differences`` are those of the family.

        Raises KeyError for a missing field, UserError for an unknown rope type.
        """
        heads = config["num_attention_heads"]
        common = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["max_position_embeddings"],
            "norm_eps": config["rms_norm_eps"],
            "rope": RopeSpec.from_hf(config),
            "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
            "init_std": config.get("initializer_range", 0.02),
        }
        return cls(family=family, **(common | differences))

    @property
    def rope_dim(self) -> int:
        """Number of rotated dimensions per head."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        """Return the rows of the stored embedding: a multiple of VOCAB_PADDING and of the tensor ranks."""
        rows = -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        return -(-rows // tensor_parallel_size) * tensor_parallel_size


VOCAB_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this; storing the same rows allows it to alias the embedding."""
