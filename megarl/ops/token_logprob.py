"""Logprob and entropy of each token from logits, in one pass and without a [T, V] temporary.

With x the row's logits over temperature, M their maximum and p = softmax(x):

    logprob = x[target] - M - log(sum_j exp(x_j - M))
    entropy = log(sum_j exp(x_j - M)) - sum_j p_j (x_j - M)

Each vocabulary shard yields four floats per row (:class:`RowStats`); tensor parallelism gathers those in one
collective and combines them. The combination is ordinary autograd on [R] tensors; the native backward turns
its gradients into the gradient of the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megarl.ops._load import load_native
from megarl.ops._shards import (
    LOGITS_CAUSE,
    check_extents,
    check_finite,
    check_targets,
    gather_shards,
    temperature_tensor,
    zero_other_rows,
)

load_native()


class TokenLogprobs(NamedTuple):
    """Per row, float32 (float64 for float64 logits)."""

    logprob: torch.Tensor  # [R], of the target, after temperature
    entropy: torch.Tensor  # [R], of the softmax after temperature, in nats


def token_logprob(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    row_index: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    min_logit: torch.Tensor | None = None,
    inplace_backward: bool = True,
    check_numerics: bool = False,
) -> TokenLogprobs:
    """Return logprob of ``targets`` and entropy under softmax(logits / temperature).

    logits [T, V_shard]: fp32, bf16, fp16 or fp64, any row stride; this rank's columns ``vocab_start ...`` of
    the vocabulary. targets [R] int64: global ids. temperature: positive, one number or [R]. row_index [R]:
    distinct rows to evaluate; all rows (R = T) if None. min_logit [R]: the softmax runs over logits at or
    above it (see ``support_min_logit``); the target always counts as inside, since it was sampled.

    **The backward overwrites the logits** with their gradient, which saves one [T, V] buffer. Pass
    ``inplace_backward=False`` if the logits are needed after backward; autograd rejects a second backward
    through overwritten logits.

    Raises:
        ValueError: wrong shapes, dtypes, devices or (on CPUs, where checking is free) targets outside the
            vocabulary; elsewhere such targets get logprob -inf.
        FloatingPointError: with check_numerics, a result is not finite; names the row.
    """
    heat = temperature_tensor(temperature, logits.device)
    stats = torch.ops.megarl.token_logprob(
        logits, targets, heat, vocab_start, row_index, min_logit, inplace_backward
    )
    extent = (vocab_start, logits.shape[1])
    result = combine("token_logprob", stats, heat, targets, extent, tp_group)
    if check_numerics:
        check_finite("token_logprob", result, row_index, LOGITS_CAUSE)
    return result


def combine(
    op: str,
    stats: torch.Tensor,
    temperature: torch.Tensor,
    targets: torch.Tensor,
    extent: tuple[int, int],
    tp_group: dist.ProcessGroup | None,
) -> TokenLogprobs:
    """Merge the shards' row statistics [R, 4] (one all_gather) into logprob and entropy, differentiably.

    extent is this shard's (vocab_start, columns). Every rank of the group must compute the same loss from the
    result: the gradient each rank sends back to its own shard is not summed over ranks.
    """
    shards, extents = gather_shards(stats, tp_group, extent)  # [P, R, 4]
    if extents is not None:
        check_targets(op, targets, *check_extents(op, extents))
    if shards.shape[0] == 1:
        maximum, total, target, weighted = shards[0].unbind(-1)
        maximum = maximum.detach()
    else:
        shard_max = shards[..., 0].detach()
        maximum = shard_max.amax(0)
        # A shard without finite logits has sums of 0, and its shift is -inf.
        shift = ((shard_max - maximum) / temperature).masked_fill(shard_max == -torch.inf, 0.0)
        scale = shift.exp()
        total = (scale * shards[..., 1]).sum(0)
        weighted = (scale * (shards[..., 3] + shift * shards[..., 1])).sum(0)
        target = shards[..., 2].amax(0)
    log_total = total.log()
    return TokenLogprobs((target - maximum) / temperature - log_total, log_total - weighted / total)


@torch.library.register_fake("megarl::token_logprob")
def _fake_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    vocab_start: int,
    row_index: torch.Tensor | None,
    min_logit: torch.Tensor | None,
    inplace_backward: bool,
) -> torch.Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(targets.shape[0], 4, dtype=dtype)


@torch.library.register_fake("megarl::token_logprob_backward_")
def _fake_backward(*arguments: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits, targets, temperature, vocab_start, row_index, min_logit, inplace_backward = inputs
    ctx.save_for_backward(logits, targets, temperature, row_index, min_logit, output)
    ctx.vocab_start = vocab_start
    ctx.inplace_backward = inplace_backward


def _backward(ctx: Any, grad_stats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    logits, targets, temperature, row_index, min_logit, stats = ctx.saved_tensors
    grad = logits.detach() if ctx.inplace_backward else logits.clone()
    torch.ops.megarl.token_logprob_backward_(
        grad, targets, temperature, ctx.vocab_start, row_index, min_logit, stats[:, 0], grad_stats
    )
    zero_other_rows(grad, row_index)
    # Custom ops do not count as writes to autograd's version counter; a later backward must notice this one.
    torch.autograd.graph.increment_version(grad)
    return grad, None, None, None, None, None, None


torch.library.register_autograd("megarl::token_logprob", _backward, setup_context=_save)
