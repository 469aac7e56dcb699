"""Bytes that a forward pass keeps for its backward pass, on one GPU.

Counted as Korthikanti et al. 2022 (arXiv:2205.05198, section 4) count them, tensor by tensor, for what
MegaRL's layers keep: gated MLPs, RMS norms without dropout, grouped-query attention that never stores the
[s, s] matrices (which their selective recomputation is for), latent attention, experts.

T is the tokens of a microbatch on this context-parallel rank, t the tensor-parallel size, and s is 1 / t
with sequence parallelism, else 1. Every tensor counts once, with the parameters' type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarl.layout import ParallelLayout
from megarl.models.spec import ModelSpec, MoeSpec

Recompute = Literal["off", "selective", "full"]
_FP32 = 4


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one GPU sees of a microbatch: ``tokens`` T."""

    tokens: float
    item: int  # bytes per element


def layer_bytes(
    spec: ModelSpec, layer: int, layout: ParallelLayout, batch: Microbatch, recompute: Recompute = "off"
) -> float:
    """What one layer keeps of one microbatch."""
    if recompute == "full":
        return _input_bytes(spec, layout, batch)
    attention = _latent_attention if spec.mla else _attention
    elements = attention(spec, layout, recompute)
    fp32 = 0.0
    if recompute == "off":
        fp32 += spec.num_heads / layout.tensor  # log-sums of the attention
    if spec.moe is not None and layer in spec.moe.layers:
        elements += _experts(spec, spec.moe, layout)
        fp32 += 2 * spec.moe.num_experts * _share(layout)  # the router's logits and probabilities
    else:
        elements += _dense_mlp(spec, layout)
    return batch.tokens * (batch.item * elements + _FP32 * fp32)


def _input_bytes(spec: ModelSpec, layout: ParallelLayout, batch: Microbatch) -> float:
    """A layer's input, all that full recomputation keeps: T h s."""
    return batch.tokens * batch.item * spec.hidden_size * _share(layout)


def head_bytes(spec: ModelSpec, layout: ParallelLayout, batch: Microbatch) -> float:
    """Behind the last layer: the final norm's input, T h s, and the rows that the head reads, T h.

    Logits never exist as a whole (megarl/ops/linear_token_logprob.py). Prompt tokens have no row; the
    count takes all tokens.
    """
    return batch.tokens * batch.item * spec.hidden_size * (1 + _share(layout))


def _share(layout: ParallelLayout) -> float:
    return 1 / layout.tensor if layout.sequence_parallel else 1.0


def _attention(spec: ModelSpec, layout: ParallelLayout, recompute: Recompute) -> float:
    """Elements per token.

    Norm input, input of q|k|v, input of the output projection; where q and k have norms also q|k|v. Then
    either what the core attention starts from, or what it keeps: q, k, v with their positions and, where it
    was computed by sequences of similar length, the result in that order. Context-parallel ranks keep their
    own share of k and v and gather the others' again.
    """
    q = spec.num_heads * spec.head_dim / layout.tensor
    kv = max(spec.num_kv_heads / layout.tensor, 1) * spec.head_dim
    kept = spec.hidden_size * _share(layout) * (3 if spec.sandwich_norms else 2) + q
    if spec.qk_norm:
        kept += q + 2 * kv
    if recompute == "selective":
        return kept + (q + kv if spec.qk_norm else q + 2 * kv)
    return kept + q + 2 * kv + _by_sequence(q, layout)


def _by_sequence(result: float, layout: ParallelLayout) -> float:
    return result if layout.context == 1 else 0.0


def _latent_attention(spec: ModelSpec, layout: ParallelLayout, recompute: Recompute) -> float:
    """As :func:`_attention`, with the inputs of both latents' norms and of what projects up from them."""
    mla = spec.mla
    assert mla is not None
    heads = spec.num_heads / layout.tensor
    q = k = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    values = heads * mla.v_head_dim
    latents = 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    kept = (2 * spec.hidden_size + latents) * _share(layout) + values + q
    if recompute == "selective":
        return kept + k + values
    return kept + k + values + _by_sequence(values, layout)


def _dense_mlp(spec: ModelSpec, layout: ParallelLayout) -> float:
    """Elements per token: norm input, MLP input, gate|up, and what goes into the second projection."""
    around = spec.hidden_size * _share(layout) * (3 if spec.sandwich_norms else 2)
    return around + 3 * spec.intermediate_size / layout.tensor


def _experts(spec: ModelSpec, moe: MoeSpec, layout: ParallelLayout) -> float:
    """Elements per token, with tokens spread evenly over experts.

    Of the s T k routed copies of a group of expert-tensor ranks each rank sees those of all: h of input,
    then gate, up, the activation and its scaled copy.
    """
    around = 2 * spec.hidden_size * _share(layout)
    routed = _share(layout) * moe.experts_per_token * layout.expert_tensor
    inner = 4 * moe.intermediate_size / layout.expert_tensor
    shared = 3 * moe.shared_intermediate_size / layout.tensor
    return around + routed * (spec.hidden_size + inner) + shared


def chunks_in_flight(layout: ParallelLayout, stage: int, num_microbatches: int | None) -> int:
    """Forward passes of model chunks whose backward pass is still to come, at most, on one stage.

    1F1B: stages - stage. Interleaved (section 4.2.3, and Megatron's schedule): 2 (stages - stage - 1) +
    (virtual - 1) stages + 1 chunks, on the first stage layers / stages x (1 + (stages - 1) / (stages x
    virtual)) of each of ``stages`` microbatches. ``num_microbatches`` None: enough to fill the pipeline.
    """
    behind = layout.pipeline - stage - 1
    if layout.virtual == 1:
        most = behind + 1
    else:
        most = 2 * behind + (layout.virtual - 1) * layout.pipeline + 1
    return most if num_microbatches is None else min(most, num_microbatches * layout.virtual)


def stage_bytes(
    spec: ModelSpec,
    layout: ParallelLayout,
    stage: int,
    batch: Microbatch,
    *,
    recompute: Recompute,
    num_microbatches: int | None,
) -> float:
    """The most that a pipeline stage keeps at any time: what its layers keep, and one computed again."""
    chunks = range(layout.virtual)
    layers = [n for chunk in chunks for n in layout.stage_layers(spec.num_layers, stage, chunk)]
    kept = [layer_bytes(spec, number, layout, batch, recompute) for number in layers]
    again = [layer_bytes(spec, number, layout, batch) - own for number, own in zip(layers, kept, strict=True)]
    total = sum(kept) / layout.virtual * chunks_in_flight(layout, stage, num_microbatches)
    total += max(again, default=0.0)
    if stage == layout.pipeline - 1:
        total += head_bytes(spec, layout, batch)
    return total
