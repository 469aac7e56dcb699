"""Sequences of one microbatch to the tensors of a PackedBatch, and values per token back to sequences."""

from __future__ import annotations

import torch

from megarl.records import PackedBatch, Sequence


def pack(
    sequences: list[Sequence],
    indices: list[int],
    *,
    pad_to_multiple: int = 1,
    device: torch.device | str = "cpu",
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
        device: where the tensors go; one copy per field.
    """
    with_logprobs = bool(sequences) and bool(sequences[0].rollout_logprobs)
    chosen = [sequences[i] for i in indices] or [Sequence([], [], rollout_logprobs=[])]
    _check(sequences, indices, with_logprobs)
    lengths = [len(s.token_ids) for s in chosen]
    padded = [max(1, -(-n // pad_to_multiple)) * pad_to_multiple for n in lengths]
    num_tokens = sum(padded)
    token_ids = torch.zeros(num_tokens, dtype=torch.int64)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    loss_mask = torch.zeros(num_tokens)
    advantages = torch.zeros(num_tokens)
    logprobs = torch.zeros(num_tokens)
    start = 0
    for sequence, n, width in zip(chosen, lengths, padded, strict=True):
        ids = torch.tensor(sequence.token_ids, dtype=torch.int64)
        token_ids[start : start + n] = ids
        if n > 1:
            targets = torch.tensor(sequence.loss_mask[1:], dtype=torch.float32)
            span = slice(start, start + n - 1)
            labels[span] = ids[1:]
            loss_mask[span] = targets
            advantages[span] = targets * sequence.advantage
            if with_logprobs:
                logprobs[span] = torch.tensor(sequence.rollout_logprobs[1:]).where(
                    targets > 0, torch.zeros(())
                )
        start += width
    widths = torch.tensor(padded)
    cu_seqlens = torch.zeros(len(padded) + 1, dtype=torch.int32)
    cu_seqlens[1:] = widths.cumsum(0)
    return PackedBatch(
        token_ids=token_ids.to(device),
        labels=labels.to(device),
        loss_mask=loss_mask.to(device),
        position_ids=torch.cat([torch.arange(width) for width in padded]).to(device),
        cu_seqlens=cu_seqlens.to(device),
        sequence_ids=torch.tensor(indices or [0]).repeat_interleave(widths).to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32).to(device),
        advantages=advantages.to(device),
        rollout_logprobs=logprobs.to(device) if with_logprobs else None,
    )


def unpack(values: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
    """The inverse of pack for one per-token field: values [T] to one [n] tensor per sequence.

    Back in the alignment of :class:`megarl.records.Sequence`: element i belongs to the prediction of
    token i, element 0 (which nothing predicts) is 0. In the order of pack's ``indices``; padding and
    the dummy sequence are left out. Any dtype; ``values`` must cover the whole batch, so gather a
    context-parallel slice first.
    """
    assert values.shape[0] == batch.token_ids.shape[0], f"values {tuple(values.shape)} do not match the batch"
    starts = batch.cu_seqlens.tolist()
    lengths = (batch.cu_seqlens.diff() if batch.lengths is None else batch.lengths).tolist()
    sequences = []
    for start, n in zip(starts, lengths, strict=False):
        if n > 0:
            sequence = torch.zeros(n, dtype=values.dtype, device=values.device)
            sequence[1:] = values[start : start + n - 1]
            sequences.append(sequence)
    return sequences


def _check(sequences: list[Sequence], indices: list[int], with_logprobs: bool) -> None:
    for index in indices:
        sequence = sequences[index]
        n = len(sequence.token_ids)
        assert n > 0, f"sequence {index} is empty"
        assert len(sequence.loss_mask) == n, (
            f"sequence {index}: {len(sequence.loss_mask)} mask values, {n} tokens"
        )
        expected = n if with_logprobs else 0
        found = len(sequence.rollout_logprobs)
        assert found == expected, f"sequence {index}: {found} rollout_logprobs, expected {expected}"
