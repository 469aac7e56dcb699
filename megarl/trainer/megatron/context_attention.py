"""Causal attention of packed sequences over context-parallel ranks, with memory divided among them.

A rank holds the zigzag chunks of each sequence (batching/context_parallel.py). K and V are all-gathered for
the queries of one layer at a time, in the forward pass and again in the backward pass, so in between a rank
keeps only its own share. The queries of a chunk see the tokens before it without a mask and their own chunk
causally: two calls of a fused kernel, whose softmaxes are joined by their log-sum-exp (as FlashAttention, Dao
et al. 2022, joins its blocks). Neither a mask nor a matrix of queries by keys is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megarl.batching.context_parallel import zigzag_indices

_aten = torch.ops.aten
_CUDA_LSE_MULTIPLE = 32
"""The CUDA kernel's backward reads log-sum-exps in rows padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of this rank's queries, and the spans of the whole token row that they attend to.

    They see all of ``before``, and ``own`` causally.
    """

    rows: slice
    before: tuple[slice, ...]
    own: slice

    def spans(self) -> list[tuple[slice, bool]]:
        """Return each span of keys, with True for the causal one."""
        return [*((span, False) for span in self.before), (self.own, True)]


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    prefixes: list[tuple[int, int] | None] | None,
    scale: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """q [T, heads, d], k and v [T, kv_heads, d], this rank's chunks of each sequence -> [T, heads, d].

    ``lengths`` are those of the whole sequences, multiples of 2 * group.size(). A sequence with a prefix
    [start, stop), tokens of the row over all ranks, attends to those first.
    """
    size, rank = group.size(), group.rank()
    bounds = torch.tensor([0, *accumulate(lengths)])
    order = torch.cat([zigzag_indices(bounds, r, size) for r in range(size)]).to(q.device)
    chunks = []
    local = start = 0
    for length, prefix in zip(lengths, prefixes or [None] * len(lengths), strict=True):
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            own = start + number * chunk
            before = [slice(*prefix)] if prefix else []
            if number:
                before.append(slice(start, own))
            chunks.append(_Chunk(slice(local, local + chunk), tuple(before), slice(own, own + chunk)))
            local += chunk
        start += length
    return _ContextAttention.apply(q, k, v, chunks, order, scale, group)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        chunks: list[_Chunk],
        order: torch.Tensor,
        scale: float,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        keys, values = _gather(k, v, order, group)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=_accumulator(q.dtype))
        for chunk in chunks:
            parts = [
                _attend(q[chunk.rows], keys[span], values[span], causal, scale)
                for span, causal in chunk.spans()
            ]
            out[chunk.rows], lse[chunk.rows] = parts[0] if len(parts) == 1 else _join(parts)
        ctx.save_for_backward(q, k, v, out, lse, order)
        ctx.chunks, ctx.scale, ctx.group = chunks, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, order = ctx.saved_tensors
        keys, values = _gather(k, v, order, ctx.group)
        grad_q, grad_keys, grad_values = (torch.zeros_like(x) for x in (q, keys, values))
        for chunk in ctx.chunks:
            rows = chunk.rows
            for span, causal in chunk.spans():
                # With the joined output and log-sum-exp, each span's part of the gradient is exact.
                part = (grad[rows], q[rows], keys[span], values[span], out[rows], lse[rows])
                part_q, part_k, part_v = _attend_backward(*part, causal, ctx.scale)
                grad_q[rows] += part_q
                grad_keys[span] += part_k
                grad_values[span] += part_v
        del keys, values
        grad_k, grad_v = (_scatter(x, order, ctx.group) for x in (grad_keys, grad_values))
        return grad_q, grad_k, grad_v, None, None, None, None


def _gather(
    k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Gather K and V of all ranks in order of position: two of [T all, kv_heads, d]."""
    whole = []
    for x in (k, v):
        ranks = x.new_empty((order.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(ranks, x.contiguous(), group=group)
        whole.append(torch.empty_like(ranks).index_copy_(0, order, ranks))
    return whole


def _scatter(grad: torch.Tensor, order: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Reduce-scatter the gradient [T all, ...] to this rank's tokens."""
    mine = grad.new_empty((grad.shape[0] // group.size(), *grad.shape[1:]))
    dist.reduce_scatter_tensor(mine, grad.index_select(0, order), group=group)
    return mine


def _join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [t, heads, d] over disjoint keys and their log-sum-exps [t, heads] -> those over all keys."""
    lse = torch.stack([part for _, part in parts])
    joined = lse.logsumexp(0)
    out = sum(o * w[..., None] for (o, _), w in zip(parts, (lse - joined).exp(), strict=True))
    assert isinstance(out, torch.Tensor)
    return out, joined


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _batched(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[t, heads, d] -> [1, heads, t, d]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention of q [t, heads, d] over k, v [s, kv_heads, d]: output, log-sum-exp [t, heads]."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *_batched(q, k, v), 0.0, causal, scale=scale
        )
    else:
        out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
            *_batched(q, *_repeated(q, k, v)), None, True, 0.0, causal, scale=scale
        )
    return out[0].transpose(0, 1), lse[0, :, : q.shape[0]].transpose(0, 1)


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v; ``out`` and ``lse`` are those over all keys, k and v a part of them."""
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_batched(grad, q, k, v, out), lse.transpose(0, 1)[None], 0.0, causal, scale=scale
        )
        return tuple(x[0].transpose(0, 1) for x in grads)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        *_batched(grad, q, *_repeated(q, k, v)),
        None,
        *_batched(out),
        _cuda_lse(lse),
        no_dropout,
        no_dropout,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    grad_q, grad_k, grad_v = (x[0].transpose(0, 1) for x in grads[:3])
    heads = (k.shape[1], -1)
    return grad_q, grad_k.unflatten(1, heads).sum(2), grad_v.unflatten(1, heads).sum(2)


def _cuda_lse(lse: torch.Tensor) -> torch.Tensor:
    """Pad log-sum-exps [t, heads] as the CUDA kernel's backward reads them: rows [1, heads, t padded]."""
    rest = -lse.shape[0] % _CUDA_LSE_MULTIPLE
    # Padding by 0 would keep the transposed strides.
    return F.pad(lse.transpose(0, 1)[None], (0, rest), value=float("inf")).contiguous()


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Repeat K and V for every query head: this kernel needs equally many."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
