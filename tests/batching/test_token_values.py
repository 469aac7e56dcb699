"""Scatter and gather of per-token values through shared prefixes, padding and context slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.batching.pack import pack
from megarl.batching.segments import Segments
from megarl.batching.shared_prefix import share_prefixes
from megarl.batching.token_values import add_targets, at_targets, per_sequence
from megarl.records import PackedBatch, TokenSequence, TrainBatch


def make_batch() -> TrainBatch:
    prompt = [7, 8, 9, 10, 11, 12]
    responses = [[1, 2, 3], [4], [5, 6, 7, 8]]
    return TrainBatch.of(
        TokenSequence(prompt + r, [0] * 6 + [1 - (i == 1) for i in range(len(r))], num_prompt_tokens=6)
        for r in responses
    )


def packed(shared: bool, cp_size: int) -> list[PackedBatch]:
    batch = make_batch()
    segments = Segments.whole(batch)
    if shared:
        segments, _ = share_prefixes(batch, np.arange(3), max_tokens=100, pad_to_multiple=2 * cp_size)
        assert len(segments) == 4
    return [
        pack(
            batch,
            list(range(len(segments))),
            segments=segments,
            pad_to_multiple=2 * cp_size,
            cp_rank=rank,
            cp_size=cp_size,
        )
        for rank in range(cp_size)
    ]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_is_put_stands_at_its_token_and_comes_back(shared: bool, cp_size: int) -> None:
    batch, rows = make_batch(), np.arange(3)
    values = 1000.0 + batch.token_ids + 100 * np.repeat(rows, batch.lengths)
    found = np.zeros(batch.num_tokens)
    for micro in packed(shared, cp_size):
        field = at_targets(micro, values, batch.offsets, rows)
        by_sequence = per_sequence(micro, torch.tensor([0.5, 1.5, 2.5]))
        for row in range(len(field)):
            expected, own = 0.0, 0.0
            if micro.loss_mask[row]:
                expected = 100.0 * int(micro.sequence_ids[row]) + 1000 + int(micro.labels[row])
                own = int(micro.sequence_ids[row]) + 0.5
            assert float(field[row]) == expected
            assert float(by_sequence[row]) == own
        add_targets(micro, field, found, batch.offsets, rows)
    assert found.tolist() == (values * batch.targets()).tolist()


def test_sequences_are_counted_by_their_numbers_in_the_step() -> None:
    """A rank that has sequences 2, 5 and 9 of a step keeps their values end to end."""
    batch, rows = make_batch(), np.array([2, 5, 9])
    [micro] = packed(False, 1)
    values = np.arange(batch.num_tokens, dtype=np.float32)
    plain = at_targets(micro, values, batch.offsets, np.arange(3))
    micro.sequence_ids = torch.from_numpy(rows)[micro.sequence_ids]
    assert torch.equal(at_targets(micro, values, batch.offsets, rows), plain)
    assert float(per_sequence(micro, torch.arange(10.0)).max()) == 9
