"""Choices of experts and padding of a packed microbatch, token by token."""

from __future__ import annotations

import numpy as np
import torch

from megarl.batching.context_parallel import zigzag_indices
from megarl.records import PackedBatch


def real_tokens(batch: PackedBatch, cp_rank: int = 0, cp_size: int = 1) -> torch.Tensor:
    """Which of a context-parallel rank's tokens are no padding: [T] bool."""
    bounds = batch.cu_seqlens.long()
    padded = bounds.diff()
    place = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(padded)
    lengths = padded if batch.lengths is None else batch.lengths.long()
    real = place < lengths.repeat_interleave(padded)
    return real[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else real


def pack_experts(
    experts: np.ndarray,
    spans: list[tuple[int, int]],
    batch: PackedBatch,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> torch.Tensor:
    """Experts to replay [T, layers, k] int16: those of ``spans`` (start, length) of [., layers, k], packed.

    ``batch`` holds the same spans as segments. -1 in padding. Unlike what belongs to labels, the value at t
    is that of token t itself.
    """
    bounds = batch.cu_seqlens.tolist()
    packed = np.full((bounds[-1], *experts.shape[1:]), -1, dtype=np.int16)
    for to, (start, length) in zip(bounds[:-1], spans, strict=False):  # none: a dummy
        packed[to : to + length] = experts[start : start + length]
    tensor = torch.from_numpy(packed).to(batch.token_ids.device)
    return tensor[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else tensor
