"""Pack segments into the tensors of a PackedBatch, and unpack per-token values into sequences."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from megarl.batching.expert_routing import pack_experts
from megarl.batching.segments import Segments
from megarl.ops.pack import PackedRows, RaggedTokens, pack_sequences, unpack_values
from megarl.records import PackedBatch, TrainBatch


class Packer:
    """Pack segments of one batch, whose tokens are moved to the device once."""

    def __init__(
        self,
        batch: TrainBatch,
        segments: Segments | None = None,
        *,
        advantages: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``advantages`` [S] float, for all targets of a sequence; 0 if not given."""
        self._batch, self._device = batch, device
        self._segments = segments or Segments.whole(batch)
        self._starts = self._segments.starts(batch)
        self._advantages = np.zeros(len(batch)) if advantages is None else advantages
        _check(batch, self._segments)

        def flat(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        logprobs = batch.rollout_logprobs
        self.tokens = RaggedTokens(
            flat(batch.token_ids).long(),
            flat(batch.loss_mask),
            None if logprobs is None else flat(logprobs),
        )

    def pack(
        self, indices: list[int], *, pad_to_multiple: int = 1, cp_rank: int = 0, cp_size: int = 1
    ) -> PackedBatch:
        """Pack segments ``indices`` end to end, in this order, with fields aligned with the labels.

        Position t of a sequence predicts its token t + 1, so ``loss_mask`` and ``rollout_logprobs`` shift one
        to the left; the last position, padding and non-target tokens are 0 in loss_mask, advantages and
        rollout_logprobs (whatever the batch holds there, NaN included). Each segment is padded with token 0
        to a multiple of ``pad_to_multiple``; padding comes last, so causal attention never reads it from a
        real token, and ``position_ids`` count on through it. Those of a segment with a prefix start after the
        prefix. ``sequence_ids`` are rows of the batch.

        Empty ``indices`` (a rank without sequences in this microbatch) give one dummy sequence of
        ``pad_to_multiple`` tokens with loss_mask 0 and length 0.

        Args:
            indices: the segments.
            pad_to_multiple: 2 * context_parallel_size, or 1.
            cp_rank: with cp_size, write only this context-parallel rank's slice: equal to
                :func:`megarl.batching.context_parallel_slice` of the whole, without building the whole.
            cp_size: context-parallel size.
        """
        device, of = self._device, self._segments
        chosen = np.asarray(indices, dtype=np.int64)
        rows, lengths = of.rows[chosen], of.lengths[chosen]
        if not indices:
            lengths = np.zeros(1, dtype=np.int64)  # the dummy sequence
        padded = np.maximum(1, -(-lengths // pad_to_multiple)) * pad_to_multiple

        def tensor(values: np.ndarray, dtype: type, dummy: bool = True) -> torch.Tensor:
            if dummy and not indices:
                values = np.zeros(1)
            return torch.from_numpy(values.astype(dtype)).to(device)

        packed = PackedRows(
            starts=tensor(self._starts[chosen], np.int64),
            lengths=tensor(lengths, np.int32),
            rows=tensor(rows, np.int64),
            advantages=tensor(self._advantages[rows], np.float32),
            cu_seqlens=tensor(np.concatenate([[0], padded.cumsum()]), np.int32, dummy=False),
        )
        fields = pack_sequences(
            self.tokens, packed, num_tokens=int(padded.sum()) // cp_size, cp_rank=cp_rank, cp_size=cp_size
        )
        position_ids, prefixes = fields.position_ids, None
        if (of.prefixes[chosen] >= 0).any():
            slots = {int(segment): slot for slot, segment in enumerate(chosen)} | {-1: -1}
            prefixes = tensor(np.array([slots[i] for i in of.prefixes[chosen].tolist()]), np.int64)
            skips = tensor(np.where(of.prefixes[chosen] >= 0, of.skips[chosen], 0), np.int64)
            position_ids = position_ids + skips.repeat_interleave(packed.cu_seqlens.diff() // cp_size)
        batch = PackedBatch(
            token_ids=fields.token_ids,
            labels=fields.labels,
            loss_mask=fields.loss_mask,
            position_ids=position_ids,
            cu_seqlens=packed.cu_seqlens,
            sequence_ids=fields.sequence_ids,
            lengths=packed.lengths,
            advantages=fields.advantages,
            rollout_logprobs=None if self._batch.rollout_logprobs is None else fields.rollout_logprobs,
            prefixes=prefixes,
        )
        if self._batch.experts is not None:
            spans = zip(self._starts[chosen].tolist(), of.lengths[chosen].tolist(), strict=True)
            batch.experts = pack_experts(self._batch.experts, list(spans), batch, cp_rank, cp_size)
        return batch


def pack(
    batch: TrainBatch,
    indices: list[int],
    *,
    segments: Segments | None = None,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
    cp_rank: int = 0,
    cp_size: int = 1,
) -> PackedBatch:
    """Pack sequences (or ``segments``) ``indices`` of ``batch`` as one microbatch (see Packer.pack)."""
    packer = Packer(batch, segments, device=device)
    return packer.pack(indices, pad_to_multiple=pad_to_multiple, cp_rank=cp_rank, cp_size=cp_size)


def unpack(values: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
    """Invert pack for one per-token field: values [T] to one [n] tensor per segment.

    The result is aligned as :class:`megarl.records.TrainBatch` is: element i belongs to the prediction of
    token i; element 0, which nothing predicts, is 0. Segments are in the order of pack's ``indices``, without
    padding and the dummy sequence. No gradient; ``values`` must cover the whole batch, so gather
    context-parallel slices first. The tensors are views of one.
    """
    lengths = batch.cu_seqlens.diff() if batch.lengths is None else batch.lengths
    sizes = lengths.tolist()
    starts = torch.tensor([0, *accumulate(sizes[:-1])], device=values.device)
    flat = unpack_values(values.detach().contiguous(), batch.cu_seqlens, lengths, starts, sum(sizes))
    return [sequence for sequence in flat.split(sizes) if len(sequence)]


def _check(batch: TrainBatch, segments: Segments) -> None:
    empty = np.flatnonzero(segments.lengths <= 0)
    assert not len(empty), f"sequence {segments.rows[empty[0]]} is empty"
    for name in ("token_ids", "loss_mask", "rollout_logprobs", "stale", "experts"):
        values = getattr(batch, name)
        assert values is None or len(values) == batch.num_tokens, (
            f"{len(values)} {name}, {batch.num_tokens} token_ids"
        )
