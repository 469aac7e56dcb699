"""pack and unpack: the worked example, padding, the shift to labels, and context-parallel slices."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from megarl.batching.context_parallel import context_parallel_slice, zigzag_indices
from megarl.batching.pack import Packer, pack, unpack
from megarl.records import PackedBatch, TokenSequence, TrainBatch


def random_sequences(rng: random.Random, n: int, longest: int, logprobs: bool = True) -> TrainBatch:
    sequences = []
    for _ in range(n):
        length = rng.randint(1, longest)
        mask = [rng.randint(0, 1) for _ in range(length)]
        values = [rng.uniform(-5, 0) if m else float("nan") for m in mask] if logprobs else None
        sequences.append(TokenSequence([rng.randint(1, 99) for _ in mask], mask, values))
    return TrainBatch.of(sequences)


def test_worked_example_of_the_record() -> None:
    a, b, c, d, e = 1, 2, 3, 4, 5
    sequences = TrainBatch.of(
        [
            TokenSequence([a, b, c], [0, 0, 1], [0.0, 0.0, -0.25]),
            TokenSequence([d, e], [1, 1], [-9.0, -0.75]),
        ]
    )
    batch = Packer(sequences, advantages=np.array([0.5, -2.0])).pack([0, 1])
    assert batch.token_ids.tolist() == [a, b, c, d, e]
    assert batch.labels.tolist() == [b, c, 0, e, 0]
    assert batch.loss_mask.tolist() == [0, 1, 0, 1, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 1, 1]
    assert batch.advantages is not None and batch.rollout_logprobs is not None and batch.lengths is not None
    assert batch.advantages.tolist() == [0, 0.5, 0, -2.0, 0]
    assert batch.rollout_logprobs.tolist() == [0, -0.25, 0, -0.75, 0]
    assert batch.lengths.tolist() == [3, 2]


def test_padding_and_order_of_indices() -> None:
    sequences = TrainBatch.of(
        [
            TokenSequence([7, 8, 9], [0, 1, 1]),
            TokenSequence([3], [1]),
            TokenSequence([4, 5, 6, 7, 8], [0, 1, 0, 1, 1]),
        ]
    )
    batch = pack(sequences, [2, 0, 1], pad_to_multiple=4)
    assert batch.token_ids.tolist() == [4, 5, 6, 7, 8, 0, 0, 0, 7, 8, 9, 0, 3, 0, 0, 0]
    assert batch.labels.tolist() == [5, 6, 7, 8, 0, 0, 0, 0, 8, 9, 0, 0, 0, 0, 0, 0]
    assert batch.loss_mask.tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.sequence_ids.tolist() == [2] * 8 + [0] * 4 + [1] * 4
    assert batch.lengths is not None and batch.lengths.tolist() == [5, 3, 1]
    assert batch.rollout_logprobs is None


def test_dtypes_are_those_of_the_record() -> None:
    batch = pack(TrainBatch.of([TokenSequence([1, 2], [0, 1], [0.0, -1.0])]), [0])
    integers = (batch.token_ids, batch.labels, batch.position_ids, batch.sequence_ids)
    assert all(t.dtype == torch.int64 for t in integers)
    assert all(
        t is not None and t.dtype == torch.float32
        for t in (batch.loss_mask, batch.advantages, batch.rollout_logprobs)
    )
    assert batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("multiple", [1, 4])
def test_empty_microbatch_is_a_dummy_without_loss(multiple: int) -> None:
    sequences = TrainBatch.of([TokenSequence([1, 2], [0, 1], [0.0, -1.0])])
    batch = pack(sequences, [], pad_to_multiple=multiple)
    assert batch.token_ids.tolist() == [0] * multiple
    assert batch.loss_mask.sum() == 0
    assert batch.cu_seqlens.tolist() == [0, multiple]
    assert batch.rollout_logprobs is not None, "the fields of the other ranks' microbatches"
    assert unpack(batch.loss_mask, batch) == []


def test_unpack_inverts_pack() -> None:
    rng = random.Random(1)
    for _ in range(50):
        sequences = random_sequences(rng, rng.randint(1, 8), 13)
        indices = rng.sample(range(len(sequences)), rng.randint(1, len(sequences)))
        batch = pack(sequences, indices, pad_to_multiple=rng.choice([1, 2, 6]))
        assert batch.rollout_logprobs is not None
        unpacked = zip(
            indices,
            unpack(batch.labels, batch),
            unpack(batch.rollout_logprobs, batch),
            unpack(batch.loss_mask, batch),
            strict=True,
        )
        for index, labels, logprobs, mask in unpacked:
            sequence = sequences[index]
            assert labels.tolist()[1:] == sequence.token_ids[1:].tolist()
            assert mask.tolist()[1:] == sequence.loss_mask[1:].tolist()
            assert sequence.rollout_logprobs is not None
            expected = [
                p if m else 0.0 for p, m in zip(sequence.rollout_logprobs, sequence.loss_mask, strict=True)
            ]
            torch.testing.assert_close(logprobs[1:], torch.tensor(expected[1:]))
            assert logprobs[0] == 0


def test_inconsistent_sequences_are_programmer_errors() -> None:
    with pytest.raises(AssertionError, match="1 loss_mask, 2 token_ids"):
        TokenSequence([1, 2], [1])
    batch = TrainBatch.of([TokenSequence([1, 2], [0, 1])])
    with pytest.raises(AssertionError, match="1 rollout_logprobs, 2 token_ids"):
        pack(dataclasses.replace(batch, rollout_logprobs=np.zeros(1, dtype=np.float32)), [0])
    with pytest.raises(AssertionError, match="sequence 1 is empty"):
        pack(TrainBatch.of([TokenSequence([1, 2], [0, 1]), TokenSequence([], [])]), [0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_slices_partition_the_batch(size: int) -> None:
    rng = random.Random(size)
    sequences = random_sequences(rng, 5, 40)
    batch = pack(sequences, [0, 1, 2, 3, 4], pad_to_multiple=2 * size)
    slices = [context_parallel_slice(batch, rank, size) for rank in range(size)]
    order = torch.cat([zigzag_indices(batch.cu_seqlens, rank, size) for rank in range(size)])
    assert sorted(order.tolist()) == list(range(len(batch.token_ids)))
    for field in dataclasses.fields(PackedBatch):
        whole = getattr(batch, field.name)
        if field.name in ("token_share", "split"):
            assert all(getattr(s, field.name) == whole for s in slices)
        elif field.name in ("cu_seqlens", "lengths"):
            assert all(torch.equal(getattr(s, field.name), whole) for s in slices), "global on every rank"
        elif isinstance(whole, float):
            assert all(getattr(s, field.name) == whole for s in slices)
        elif whole is not None:
            restored = torch.empty_like(whole)
            restored[order] = torch.cat([getattr(s, field.name) for s in slices])
            assert torch.equal(restored, whole), field.name


def test_zigzag_order_written_out() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag_indices(cu_seqlens, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_indices(cu_seqlens, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    with pytest.raises(AssertionError, match="does not divide"):
        zigzag_indices(torch.tensor([0, 6]), 0, 2)
