"""Pack ragged sequences into a microbatch's tensors in one pass, and unpack per-token values.

The layout is :class:`megarl.records.PackedBatch`; :mod:`megarl.batching` builds the arguments. None of the
fields carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megarl.ops._load import load_native

load_native()


class RaggedTokens(NamedTuple):
    """Sequences end to end or with gaps; per-token fields are aligned with the tokens."""

    token_ids: torch.Tensor  # [N] int64
    loss_mask: torch.Tensor  # [N] uint8, 1 where the token is a target
    rollout_logprobs: torch.Tensor | None  # [N] float32


class PackedRows(NamedTuple):
    """The sequences to pack, in order, and values that all tokens of a sequence share."""

    starts: torch.Tensor  # [S] int64, first token in RaggedTokens
    lengths: torch.Tensor  # [S] int32, 0 for a dummy
    rows: torch.Tensor  # [S] int64, written to sequence_ids
    advantages: torch.Tensor  # [S] float32
    cu_seqlens: torch.Tensor  # [S + 1] int32, padded


class PackedFields(NamedTuple):
    """Per-token fields in label alignment, zeros in padding."""

    token_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64
    loss_mask: torch.Tensor  # [T] float32
    position_ids: torch.Tensor  # [T] int64
    sequence_ids: torch.Tensor  # [T] int64
    advantages: torch.Tensor  # [T] float32
    rollout_logprobs: torch.Tensor  # [T] float32, or [0]


def pack_sequences(
    tokens: RaggedTokens, rows: PackedRows, *, num_tokens: int, cp_rank: int = 0, cp_size: int = 1
) -> PackedFields:
    """Pack ``rows`` of ``tokens``; num_tokens = cu_seqlens[-1] / cp_size, passed to avoid a device sync.

    With context parallelism only the zigzag share of ``cp_rank`` is written (see
    :func:`megarl.batching.context_parallel_slice`).

    Raises:
        ValueError: wrong shapes and dtypes and, on CPUs, rows outside the tokens, too little room in
        cu_seqlens,
            or padded lengths not divisible by 2 * cp_size.
    """
    return PackedFields(*torch.ops.megarl.pack_sequences(*tokens, *rows, num_tokens, cp_rank, cp_size))


def unpack_values(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    num_values: int,
) -> torch.Tensor:
    """Unpack values [T] in label alignment to [num_values] in token alignment, without padding.

    Sequence s (lengths [S] int32 of them real) starts at starts [S] int64; its element 0, which nothing
    predicts, is 0. Any dtype of 2, 4 or 8 bytes.

    Raises:
        ValueError: the arguments are inconsistent.
    """
    unpacked: torch.Tensor = torch.ops.megarl.unpack_values(values, cu_seqlens, lengths, starts, num_values)
    return unpacked


@torch.library.register_fake("megarl::pack_sequences")
def _(
    token_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    rollout_logprobs: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_tokens: int,
    cp_rank: int,
    cp_size: int,
) -> PackedFields:
    def field(dtype: torch.dtype, size: int = num_tokens) -> torch.Tensor:
        return token_ids.new_empty(size, dtype=dtype)

    whole, real = torch.int64, torch.float32
    with_logprobs = num_tokens if rollout_logprobs is not None else 0
    return PackedFields(
        field(whole),
        field(whole),
        field(real),
        field(whole),
        field(whole),
        field(real),
        field(real, with_logprobs),
    )


@torch.library.register_fake("megarl::unpack_values")
def _(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    num_values: int,
) -> torch.Tensor:
    return values.new_empty(num_values)
