"""Slice a packed microbatch for one context-parallel rank."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import torch

from megarl.records import PackedBatch

_NOT_PER_TOKEN = frozenset({"cu_seqlens", "lengths", "prefixes", "token_share", "split"})


def zigzag_indices(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return the positions [T / size] int64 of the packed row that ``rank`` of ``size`` computes, in order.

    Each sequence is cut into 2 * size equal chunks; rank r holds chunks r and 2 * size - 1 - r: with causal
    attention an early (cheap) and a late (expensive) one, so all ranks do the same work.
    """
    bounds = cu_seqlens.tolist()
    pieces = []
    for start, end in pairwise(bounds):
        chunk, rest = divmod(end - start, 2 * size)
        assert rest == 0, f"sequence of {end - start} tokens does not divide into 2 * {size} chunks"
        for piece in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + piece * chunk, start + (piece + 1) * chunk))
    return torch.cat(pieces).to(cu_seqlens.device)


def context_parallel_slice(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """Slice every per-token field [T] of a packed batch to the [T / size] of one context-parallel rank.

    Sequences must be padded to a multiple of 2 * size (``pack(pad_to_multiple=...)``). ``cu_seqlens`` and
    ``lengths`` stay global, as Megatron's packed_seq_params require: its rotary embedding and attention
    divide by the context-parallel size themselves. The boundaries of the slice are ``cu_seqlens // size``.
    Labels are shifted before slicing, so a chunk's last label is the first token of the next chunk, on
    whichever rank.
    """
    assert 0 <= rank < size, f"context-parallel rank {rank} of {size}"
    if size == 1:
        return batch
    index = zigzag_indices(batch.cu_seqlens, rank, size)
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in _NOT_PER_TOKEN}
    return replace(batch, **{name: v[index] for name, v in values.items() if v is not None})
