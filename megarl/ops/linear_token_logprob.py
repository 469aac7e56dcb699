"""Logprob and entropy of each token from hidden states and the head's weight, without the full logits.

The forward computes the logits one tile at a time and keeps four floats per row (token_logprob.py has the
formulas); the backward recomputes each tile, turns it into its gradient in place, and multiplies it into the
gradients of hidden and weight. One GEMM forward, three backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megarl.ops._shards import LOGITS_CAUSE, check_finite, temperature_tensor
from megarl.ops.token_logprob import TokenLogprobs, combine

DEFAULT_MAX_EXTRA_BYTES = 64 * 2**20


def linear_token_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    max_extra_bytes: int = DEFAULT_MAX_EXTRA_BYTES,
    row_index: torch.Tensor | None = None,
    min_logit: torch.Tensor | None = None,
    check_numerics: bool = False,
) -> TokenLogprobs:
    """Return logprob of ``targets`` and entropy under softmax(hidden @ weight.T / temperature).

    hidden [T, H] and weight [V_shard, H] of one dtype; weight is this rank's rows ``vocab_start ...`` of the
    head, without rows that only pad the vocabulary. targets [R] int64: global ids. temperature: positive, one
    number or [R]. row_index [R]: rows of hidden to evaluate (R = T without). A tile of logits takes at most
    max_extra_bytes; do not pass rows without a loss.

    With tensor parallelism the gradient of hidden is **this shard's contribution only**: the caller sums it
    over the group, as Megatron's copy_to_tensor_model_parallel_region does if hidden passed through it. The
    gradient of weight goes through autograd to weight.grad; Megatron's main_grad is not written.

    Raises:
        ValueError, FloatingPointError: as :func:`megarl.ops.token_logprob`.
    """
    if row_index is not None:
        hidden = hidden.index_select(0, row_index)
    heat = temperature_tensor(temperature, hidden.device)
    stats = torch.ops.megarl.linear_token_logprob(
        hidden, weight, targets, heat, vocab_start, min_logit, max_extra_bytes
    )
    extent = (vocab_start, weight.shape[0])
    result = combine("linear_token_logprob", stats, heat, targets, extent, tp_group)
    if check_numerics:
        check_finite("linear_token_logprob", result, row_index, LOGITS_CAUSE)
    return result


@torch.library.register_fake("megarl::linear_token_logprob")
def _fake_stats(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], 4, dtype=dtype)


@torch.library.register_fake("megarl::linear_token_logprob_backward")
def _fake_backward(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    need_hidden, need_weight = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden, weight, targets, temperature, vocab_start, min_logit, max_extra_bytes = inputs
    ctx.save_for_backward(hidden, weight, targets, temperature, min_logit, output)
    ctx.vocab_start = vocab_start
    ctx.max_extra_bytes = max_extra_bytes


def _backward(ctx: Any, grad_stats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, targets, temperature, min_logit, stats = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.megarl.linear_token_logprob_backward(
        hidden,
        weight,
        targets,
        temperature,
        ctx.vocab_start,
        min_logit,
        stats[:, 0],
        grad_stats,
        ctx.max_extra_bytes,
        need_hidden,
        need_weight,
    )
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight else None,
        *(None,) * 5,
    )


torch.library.register_autograd("megarl::linear_token_logprob", _backward, setup_context=_save)
