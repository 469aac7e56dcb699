"""Sequences of one microbatch to the tensors of a PackedBatch, and values per token back to sequences."""

from __future__ import annotations

from array import array
from itertools import accumulate

import torch

from megarl.ops.pack import PackedRows, RaggedTokens, pack_sequences, unpack_values
from megarl.records import PackedBatch, Sequence


def pack(
    sequences: list[Sequence],
    indices: list[int],
    *,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
    cp_rank: int = 0,
    cp_size: int = 1,
    prefix_of: list[int] | None = None,
) -> PackedBatch:
    """Lay ``sequences[i] for i in indices`` end to end, fields aligned with the labels.

    Position t of a sequence predicts its token t + 1, so ``loss_mask`` and ``rollout_logprobs`` move one
    to the left; the last position, padding, and tokens that are no targets hold 0 in loss_mask,
    advantages and rollout_logprobs (whatever a sequence held there, NaN included). Each sequence is
    padded with token 0 to a multiple of ``pad_to_multiple``; padding comes last, so causal attention
    never lets it touch a real token, and ``position_ids`` count on through it.

    An empty ``indices`` (a rank that has no sequence in this microbatch) gives one dummy sequence of
    ``pad_to_multiple`` tokens with loss_mask 0 and length 0.

    Args:
        sequences: all sequences of the step; ``sequence_ids`` point into this list.
        indices: which of them to pack, in this order.
        pad_to_multiple: 2 * context_parallel_size, or 1.
        device: where the tensors are made.
        cp_rank: with cp_size, write only the share of this context-parallel rank: the same as
            :func:`megarl.packing.context_parallel_slice` of the whole, without making the whole.
        cp_size: context-parallel size.
        prefix_of: for each of ``sequences`` the number of the one whose tokens come before its own (packed
            with it), -1: none (:mod:`megarl.packing.shared_prefix`). Its positions go on from there.
    """
    with_logprobs = bool(sequences) and bool(sequences[0].rollout_logprobs)
    _check(sequences, indices, with_logprobs)
    chosen = [sequences[i] for i in indices]
    lengths = [len(s.token_ids) for s in chosen] or [0]  # the dummy
    padded = [max(1, -(-n // pad_to_multiple)) * pad_to_multiple for n in lengths]
    rows = PackedRows(
        starts=torch.tensor([0, *accumulate(lengths[:-1])]),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        rows=torch.tensor(indices or [0]),
        advantages=torch.tensor([s.advantage for s in chosen] or [0.0]),
        cu_seqlens=torch.tensor([0, *accumulate(padded)], dtype=torch.int32),
    )
    rows = PackedRows(*(tensor.to(device) for tensor in rows))
    fields = pack_sequences(
        _flatten(chosen, with_logprobs, device),
        rows,
        num_tokens=sum(padded) // cp_size,
        cp_rank=cp_rank,
        cp_size=cp_size,
    )
    position_ids, prefixes = fields.position_ids, None
    if prefix_of is not None and any(prefix_of[i] >= 0 for i in indices):
        slot_of = {i: slot for slot, i in enumerate(indices)} | {-1: -1}
        prefixes = torch.tensor([slot_of[prefix_of[i]] for i in indices], device=device)
        offsets = torch.tensor(
            [lengths[slot] if slot >= 0 else 0 for slot in prefixes.tolist()], device=device
        )
        position_ids = position_ids + offsets.repeat_interleave(rows.cu_seqlens.diff() // cp_size)
    return PackedBatch(
        token_ids=fields.token_ids,
        labels=fields.labels,
        loss_mask=fields.loss_mask,
        position_ids=position_ids,
        cu_seqlens=rows.cu_seqlens,
        sequence_ids=fields.sequence_ids,
        lengths=rows.lengths,
        advantages=fields.advantages,
        rollout_logprobs=fields.rollout_logprobs if with_logprobs else None,
        prefixes=prefixes,
    )


def unpack(values: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
    """The inverse of pack for one per-token field: values [T] to one [n] tensor per sequence.

    Back in the alignment of :class:`megarl.records.Sequence`: element i belongs to the prediction of
    token i, element 0 (which nothing predicts) is 0. In the order of pack's ``indices``; padding and
    the dummy sequence are left out. No gradient; ``values`` must cover the whole batch, so gather
    context-parallel slices first. The tensors are views of one.
    """
    lengths = batch.cu_seqlens.diff() if batch.lengths is None else batch.lengths
    sizes = lengths.tolist()
    starts = torch.tensor([0, *accumulate(sizes[:-1])], device=values.device)
    flat = unpack_values(values.detach().contiguous(), batch.cu_seqlens, lengths, starts, sum(sizes))
    return [sequence for sequence in flat.split(sizes) if len(sequence)]


def _flatten(chosen: list[Sequence], with_logprobs: bool, device: torch.device | str) -> RaggedTokens:
    """Python lists end to end, through array and bytes: several times faster than torch.tensor(list)."""
    token_ids, loss_mask, logprobs = array("q"), bytearray(), array("f")
    for sequence in chosen:
        token_ids.extend(sequence.token_ids)
        loss_mask.extend(sequence.loss_mask)
        if with_logprobs:
            logprobs.extend(sequence.rollout_logprobs)
    if not chosen:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return RaggedTokens(empty, empty.byte(), empty.float() if with_logprobs else None)
    return RaggedTokens(
        torch.frombuffer(token_ids, dtype=torch.int64).to(device),
        torch.frombuffer(loss_mask, dtype=torch.uint8).to(device),
        torch.frombuffer(logprobs, dtype=torch.float32).to(device) if with_logprobs else None,
    )


def _check(sequences: list[Sequence], indices: list[int], with_logprobs: bool) -> None:
    for index in indices:
        sequence = sequences[index]
        n = len(sequence.token_ids)
        assert n > 0, f"sequence {index} is empty"
        masked = len(sequence.loss_mask)
        assert masked == n, f"sequence {index}: {masked} mask values, {n} tokens"
        expected = n if with_logprobs else 0
        found = len(sequence.rollout_logprobs)
        assert found == expected, f"sequence {index}: {found} rollout_logprobs, expected {expected}"
