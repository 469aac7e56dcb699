"""Choices of experts and padding of a packed microbatch, token by token."""

from __future__ import annotations

import numpy as np
import torch

from megarl.packing.context_parallel import zigzag_indices
from megarl.records import PackedBatch, Sample, Sequence


def real_tokens(batch: PackedBatch, cp_rank: int = 0, cp_size: int = 1) -> torch.Tensor:
    """Which of a context-parallel rank's tokens are no padding: [T] bool."""
    bounds = batch.cu_seqlens.long()
    padded = bounds.diff()
    place = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(padded)
    lengths = padded if batch.lengths is None else batch.lengths.long()
    real = place < lengths.repeat_interleave(padded)
    return real[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else real


def experts_to_replay(sample: Sample) -> np.ndarray | None:
    """A sample's choices for each of its tokens, [P + N, layers, k]: -1 for the last, which no engine saw."""
    if sample.experts is None:
        return None
    missing = sample.num_tokens - len(sample.experts)
    assert missing >= 1, f"{len(sample.experts)} choices for {sample.num_tokens} tokens"
    return np.pad(sample.experts, ((0, missing), (0, 0), (0, 0)), constant_values=-1)


def pack_experts(
    sequences: list[Sequence], indices: list[int], batch: PackedBatch, cp_rank: int = 0, cp_size: int = 1
) -> torch.Tensor | None:
    """Experts to replay [T, layers, k] int16 of ``sequences[i] for i in indices``, packed as ``batch``.

    -1 in padding and for sequences without any; None where no sequence of the step has any. Unlike what
    belongs to labels, the value at t is that of token t itself.
    """
    given = [s.experts for s in sequences if s.experts is not None]
    if not given:
        return None
    bounds = batch.cu_seqlens.tolist()
    packed = np.full((bounds[-1], *given[0].shape[1:]), -1, dtype=np.int16)
    for start, index in zip(bounds[:-1], indices, strict=False):  # none: a dummy
        experts = sequences[index].experts
        if experts is not None:
            length = len(sequences[index].token_ids)
            assert len(experts) == length, f"sequence {index}: {len(experts)} choices, {length} tokens"
            packed[start : start + length] = experts
    tensor = torch.from_numpy(packed).to(batch.token_ids.device)
    return tensor[zigzag_indices(batch.cu_seqlens, cp_rank, cp_size)] if cp_size > 1 else tensor
