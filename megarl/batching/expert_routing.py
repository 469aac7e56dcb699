"""Expert choices and padding mask of a packed microbatch, per token."""

from __future__ import annotations

import numpy as np
import torch

from megarl.batching.context_parallel import zigzag_indices
from megarl.records import PackedBatch


def real_tokens(batch: PackedBatch, cp_rank: int = 0, cp_size: int = 1) -> torch.Tensor:
    """Return a mask [T] bool of a context-parallel rank's tokens that are not padding."""
    bounds = batch.cu_seqlens.long()
    padded = bounds.diff()
    position = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(padded)
    lengths = padded if batch.lengths is None else batch.lengths.long()
    real = position < lengths.repeat_interleave(padded)
    return real[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else real


def pack_experts(
    experts: np.ndarray,
    spans: list[tuple[int, int]],
    batch: PackedBatch,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> torch.Tensor:
    """Pack the experts to replay, [T, layers, k] int16, from ``spans`` (start, length) of [., layers, k].

    ``batch`` holds the same spans as segments. Padding gets -1. Unlike fields aligned with labels, the value
    at t is that of token t itself.
    """
    bounds = batch.cu_seqlens.tolist()
    packed = np.full((bounds[-1], *experts.shape[1:]), -1, dtype=np.int16)
    for to, (start, length) in zip(bounds[:-1], spans, strict=False):  # no spans in a dummy microbatch
        packed[to : to + length] = experts[start : start + length]
    tensor = torch.from_numpy(packed).to(batch.token_ids.device)
    return tensor[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else tensor
