"""The support of a sampler with top-k and top-p, as the smallest kept logit per row.

An engine that reports logprobs after top-k and top-p (vLLM's processed_logprobs) renormalises over that
support. With its smallest logit as ``token_logprob(min_logit=...)`` the trainer's logprobs mean the same;
without it the ratio is off by log(kept mass) (vllm#42259).

The support is computed from the given logits: it equals the sampler's as long as the weights are those that
sampled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megarl.ops._shards import group_size

# Without top-k, top-p is first searched among this many logits: sorting a whole vocabulary takes longer than
# everything else, and few rows need it.
_FIRST_CANDIDATES = 1024


@torch.no_grad()
def support_min_logit(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    max_extra_bytes: int = 64 * 2**20,
) -> torch.Tensor:
    """Return the smallest logit [T] of the support.

    The support is the top_k largest logits (0: all), and of those the fewest with mass >= top_p. logits [T,
    V_shard]. Logits equal to the smallest one all belong to the support (a sampler breaks such ties by
    position). Returns float32 (float64 for float64), for ``min_logit``. Rows are sorted a block at a time,
    within about max_extra_bytes; with tensor parallelism a block is gathered first.

    Raises:
        ValueError: top_k < 0 or top_p outside (0, 1].
    """
    _check("support_min_logit", top_k, top_p)
    return _by_blocks(
        logits,
        lambda block: block,
        lambda rows: _smallest_kept(rows, temperature, top_k, top_p),
        logits.shape[1],
        tp_group,
        max_extra_bytes,
    )


@torch.no_grad()
def linear_support_min_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    max_extra_bytes: int = 64 * 2**20,
) -> torch.Tensor:
    """See support_min_logit; for logits hidden [T, H] @ weight [V_shard, H].T, returns [T].

    The op ``linear_token_logprob`` recomputes the logits in tiles of another shape, and rounding may make the
    smallest kept one slightly smaller. The result is therefore halfway between it and the largest excluded
    logit (-inf if there is none). Takes a separate pass over the logits: one more GEMM, a block of rows at a
    time.
    """
    _check("linear_support_min_logit", top_k, top_p)

    def between(rows: torch.Tensor) -> torch.Tensor:
        smallest = _smallest_kept(rows, temperature, top_k, top_p)
        left_out = rows.masked_fill(rows >= smallest.unsqueeze(1), -torch.inf).amax(-1)
        return smallest - (smallest - left_out) / 2

    return _by_blocks(
        hidden, lambda block: block @ weight.T, between, weight.shape[0], tp_group, max_extra_bytes
    )


def _check(op: str, top_k: int, top_p: float) -> None:
    if top_k < 0:
        raise ValueError(f"megarl::{op}: top_k must not be negative, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"megarl::{op}: top_p must lie in (0, 1], got {top_p}")


def _by_blocks(
    source: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    threshold_of: Callable[[torch.Tensor], torch.Tensor],
    columns: int,
    tp_group: dist.ProcessGroup | None,
    max_extra_bytes: int,
) -> torch.Tensor:
    dtype = torch.promote_types(source.dtype, torch.float32)
    widths = _shard_widths(columns, source.device, tp_group)
    # a block is widened, sorted (values and indices), and converted to probabilities and their sums
    bytes_per_row = sum(widths) * (4 * dtype.itemsize + 8)
    rows = max(1, max_extra_bytes // bytes_per_row)
    thresholds = [
        threshold_of(_whole_rows(logits_of(block), widths, tp_group).to(dtype))
        for block in source.split(rows)
        if len(block)
    ]
    return torch.cat(thresholds) if thresholds else source.new_empty(0, dtype=dtype)


def _smallest_kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    count = min(top_k, logits.shape[1]) if top_k else logits.shape[1]
    if not top_k and count > _FIRST_CANDIDATES and top_p < 1:
        ordered = logits.topk(_FIRST_CANDIDATES, -1).values
        mass = ((logits - ordered[:, :1]) / temperature).exp_().sum(-1, keepdim=True)
        weights = ((ordered - ordered[:, :1]) / temperature).exp_()
        if bool((weights.sum(-1, keepdim=True) >= top_p * mass).all()):
            return _logit_at_mass(ordered, weights, mass, top_p)
    # the sorted prefix kept by top-k; ties beyond it have the same logit as its last
    ordered = logits.topk(count, -1).values
    last = ordered[:, -1:]
    if top_p == 1:
        return last.squeeze(1)
    ties = (logits == last).sum(-1, keepdim=True) - (ordered == last).sum(-1, keepdim=True)
    weights = ((ordered - ordered[:, :1]) / temperature).exp_()
    mass = weights.sum(-1, keepdim=True) + ties * weights[:, -1:]
    return _logit_at_mass(ordered, weights, mass, top_p)


def _logit_at_mass(
    ordered: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor, top_p: float
) -> torch.Tensor:
    """Return the first of the descending logits where the sum of weights reaches top_p of the mass [T, 1]."""
    before = weights.cumsum(-1) - weights
    kept = (before < top_p * mass).sum(-1, keepdim=True)
    return ordered.gather(1, (kept - 1).clamp(min=0)).squeeze(1)


def _shard_widths(columns: int, device: torch.device, tp_group: dist.ProcessGroup | None) -> list[int]:
    if group_size(tp_group) == 1:
        return [columns]
    assert tp_group is not None
    widths = torch.zeros(tp_group.size(), dtype=torch.int64, device=device)
    own = torch.tensor([columns], device=device)
    dist.all_gather(list(widths.split(1)), own, group=tp_group)
    return widths.tolist()


def _whole_rows(block: torch.Tensor, widths: list[int], tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    if len(widths) == 1:
        return block
    padded = block.new_full((block.shape[0], max(widths)), -torch.inf)
    padded[:, : block.shape[1]] = block
    shards = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(shards, padded, group=tp_group)
    return torch.cat([shard[:, :width] for shard, width in zip(shards, widths, strict=True)], 1)
