"""Logprobs of soft-capped logits (Gemma 2, arXiv:2408.00118): cap * tanh(hidden . head / cap).

The fused op does not support a bound on the logits. Rows are processed a few at a time, and their logits are
recomputed in the backward pass, so memory holds the logits of a few rows only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from megarl.losses.all_reduce import sum_of_parts
from megarl.losses.hidden import Head

_MAX_LOGITS = 1 << 24
"""Logits in memory at a time."""


def capped_token_logprob(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, *, cap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logprob of ``labels`` and entropy, [N] float32 each, of hidden states [N, H].

    Each rank of ``head.group`` has rows of the vocabulary; gradients of hidden states and head then come from
    the rank's own rows only.
    """
    count = max(1, _MAX_LOGITS // max(1, head.weight.shape[0]))
    found = [
        checkpoint(_of_rows, h, head, y, cap, temperature, use_reentrant=False)
        for h, y in zip(hidden.split(count), labels.split(count), strict=True)
    ]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _of_rows(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, cap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ head.weight.T).float()
    logits = torch.tanh(logits / cap) * (cap / temperature)
    largest = logits.detach().amax(dim=1)
    if head.group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=head.group)
    shifted = logits - largest[:, None]
    powers = shifted.exp()
    inside = labels - head.vocab_start
    here = (inside >= 0) & (inside < logits.shape[1])
    chosen = shifted.gather(1, inside.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] * here
    sums = torch.stack((powers.sum(1), (powers * shifted).sum(1), chosen))
    if head.group is not None:
        sums = sum_of_parts(sums, head.group)
    total, weighted, chosen = sums
    return chosen - total.log(), total.log() - weighted / total
