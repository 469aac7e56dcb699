"""The part of the vocabulary a sampler with top-k and top-p draws from, as a smallest logit per row.

An engine that reports logprobs after top-k and top-p (vLLM's processed_logprobs) renormalises over that
support. Passing its smallest logit to ``token_logprob(min_logit=...)`` makes the trainer's logprobs
mean the same; without it the ratio is off by log(kept mass) (vllm#42259).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megarl.ops._shards import group_size


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
    """Smallest logit [T] of the support: the top_k largest (0: all), of those the fewest with mass >= top_p.

    logits [T, V_shard]. Logits equal to the smallest one all belong to the support (a sampler breaks
    such ties by position). Returns float32 (float64 for float64), ready for ``min_logit``. Rows are
    sorted a block at a time, within about max_extra_bytes; with tensor parallelism a block is gathered
    first. Raises ValueError for top_k < 0 or top_p outside (0, 1].
    """
    if top_k < 0:
        raise ValueError(f"megarl::support_min_logit: top_k must not be negative, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"megarl::support_min_logit: top_p must lie in (0, 1], got {top_p}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    widths = _shard_widths(logits, tp_group)
    # a block is widened, sorted (values and indices), and turned into probabilities and their sums
    bytes_per_row = sum(widths) * (4 * dtype.itemsize + 8)
    rows = max(1, max_extra_bytes // bytes_per_row)
    thresholds = [
        _smallest_kept(_whole_rows(block, widths, tp_group).to(dtype), temperature, top_k, top_p)
        for block in logits.split(rows)
    ]
    return torch.cat(thresholds) if thresholds else logits.new_empty(0, dtype=dtype)


def _smallest_kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    count = min(top_k, logits.shape[1]) if top_k else logits.shape[1]
    # the sorted prefix top-k keeps; ties beyond it carry the same logit as its last
    ordered = logits.topk(count, -1).values
    last = ordered[:, -1:]
    if top_p < 1:
        ties = (logits == last).sum(-1, keepdim=True) - (ordered == last).sum(-1, keepdim=True)
        weights = ((ordered - ordered[:, :1]) / temperature).exp()
        mass = weights.sum(-1, keepdim=True) + ties * weights[:, -1:]
        before = weights.cumsum(-1) - weights
        kept = (before < top_p * mass).sum(-1, keepdim=True)
        last = ordered.gather(1, (kept - 1).clamp(min=0))
    return last.squeeze(1)


def _shard_widths(logits: torch.Tensor, tp_group: dist.ProcessGroup | None) -> list[int]:
    if group_size(tp_group) == 1:
        return [logits.shape[1]]
    assert tp_group is not None
    widths = torch.zeros(tp_group.size(), dtype=torch.int64, device=logits.device)
    own = torch.tensor([logits.shape[1]], device=logits.device)
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
