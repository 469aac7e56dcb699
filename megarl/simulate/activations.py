"""Activation memory: bytes that a forward pass saves for the backward pass, on one GPU.

Counted tensor by tensor as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4), for MegaRL's layers:
gated MLPs, RMS norms without dropout, grouped-query attention without stored [s, s] matrices (the target of
their selective recomputation), latent attention, experts.

T is the number of tokens of a microbatch on this context-parallel rank, t the tensor-parallel size, and s is
1 / t with sequence parallelism, else 1. Every tensor counts once, in the dtype of the parameters.
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
    """Share of a microbatch on one GPU: ``tokens`` T."""

    tokens: float
    item: int  # bytes per element


def layer_bytes(
    spec: ModelSpec, layer: int, layout: ParallelLayout, batch: Microbatch, recompute: Recompute = "off"
) -> float:
    """Return the bytes one layer saves for one microbatch."""
    if recompute == "full":
        return _input_bytes(spec, layout, batch)
    attention = _latent_attention if spec.mla else _attention
    elements = attention(spec, layout, recompute)
    fp32 = 0.0
    if recompute == "off":
        fp32 += spec.num_heads / layout.tensor  # log-sum-exp of the attention
    if spec.moe is not None and layer in spec.moe.layers:
        elements += _experts(spec, spec.moe, layout)
        fp32 += 2 * spec.moe.num_experts * _share(layout)  # the router's logits and probabilities
    else:
        elements += _dense_mlp(spec, layout)
    return batch.tokens * (batch.item * elements + _FP32 * fp32)


def _input_bytes(spec: ModelSpec, layout: ParallelLayout, batch: Microbatch) -> float:
    """Return the bytes of a layer's input, T h s, all that full recomputation saves."""
    return batch.tokens * batch.item * spec.hidden_size * _share(layout)


def head_bytes(spec: ModelSpec, layout: ParallelLayout, batch: Microbatch) -> float:
    """Return the bytes after the last layer: the final norm's input, T h s, and the head's input, T h.

    The full logits are never materialised (megarl/ops/linear_token_logprob.py). The head reads no prompt
    tokens; this counts all tokens, an upper bound.
    """
    return batch.tokens * batch.item * spec.hidden_size * (1 + _share(layout))


def _share(layout: ParallelLayout) -> float:
    return 1 / layout.tensor if layout.sequence_parallel else 1.0


def _attention(spec: ModelSpec, layout: ParallelLayout, recompute: Recompute) -> float:
    """Return elements per token.

    Norm input, input of q|k|v, input of the output projection; with norms on q and k also q|k|v. Then the
    inputs of the core attention (selective), or what it saves: rotated q, k, v and, if computed in buckets of
    similar length, the result in that order. Context-parallel ranks save their own share of k and v and
    gather the rest again.
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
    """Return elements as :func:`_attention`, plus the inputs of both latent norms and up-projections."""
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
    """Return elements per token: norm input, MLP input, gate|up, input of the down projection."""
    around = spec.hidden_size * _share(layout) * (3 if spec.sandwich_norms else 2)
    return around + 3 * spec.intermediate_size / layout.tensor


def _experts(spec: ModelSpec, moe: MoeSpec, layout: ParallelLayout) -> float:
    """Return elements per token, with tokens spread evenly over experts.

    Each rank of an expert-tensor group processes the s T k routed copies of the whole group: input h, then
    gate, up, the activation and its scaled copy.
    """
    around = 2 * spec.hidden_size * _share(layout)
    routed = _share(layout) * moe.experts_per_token * layout.expert_tensor
    inner = 4 * moe.intermediate_size / layout.expert_tensor
    shared = 3 * moe.shared_intermediate_size / layout.tensor
    return around + routed * (spec.hidden_size + inner) + shared


def chunks_in_flight(layout: ParallelLayout, stage: int, num_microbatches: int | None) -> int:
    """Return the maximum number of model chunks in flight (forward done, backward pending) on one stage.

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
    """Return the peak bytes of a pipeline stage: saved by its layers, plus one layer being recomputed."""
    chunks = range(layout.virtual)
    layers = [n for chunk in chunks for n in layout.stage_layers(spec.num_layers, stage, chunk)]
    kept = [layer_bytes(spec, number, layout, batch, recompute) for number in layers]
    again = [layer_bytes(spec, number, layout, batch) - own for number, own in zip(layers, kept, strict=True)]
    total = sum(kept) / layout.virtual * chunks_in_flight(layout, stage, num_microbatches)
    total += max(again, default=0.0)
    if stage == layout.pipeline - 1:
        total += head_bytes(spec, layout, batch)
    return total
