"""Values per token into microbatches and back, through shared prefixes, padding and context slices."""

from __future__ import annotations

import numpy as np
import pytest

from megarl.packing.pack import pack
from megarl.packing.shared_prefix import share_prefixes
from megarl.packing.token_values import assemble, put, take
from megarl.records import PackedBatch, Sequence


def sequences() -> list[Sequence]:
    prompt = [7, 8, 9, 10, 11, 12]
    responses = [[1, 2, 3], [4], [5, 6, 7, 8]]
    return [
        Sequence(prompt + r, [0] * 6 + [1 - (i == 1) for i in range(len(r))], num_prompt_tokens=6)
        for r in responses
    ]


def batches(shared: bool, cp_size: int) -> list[PackedBatch]:
    whole = sequences()
    origins, prefix_of, parts = list(range(3)), None, whole
    if shared:
        split = share_prefixes(whole, max_tokens=100, pad_to_multiple=2 * cp_size)
        parts, origins, prefix_of = split.sequences, split.origins, split.prefix_of
        assert len(parts) == 4
    packed = [
        pack(
            parts,
            list(range(len(parts))),
            pad_to_multiple=2 * cp_size,
            cp_rank=rank,
            cp_size=cp_size,
            prefix_of=prefix_of,
        )
        for rank in range(cp_size)
    ]
    for batch in packed:
        batch.sequence_ids = batch.sequence_ids.new_tensor(origins)[batch.sequence_ids]
    return packed


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_is_put_stands_at_its_token_and_comes_back(shared: bool, cp_size: int) -> None:
    whole = sequences()
    values = [np.array([100.0 * i + 1000 + t for t in s.token_ids]) for i, s in enumerate(whole)]
    packed = batches(shared, cp_size)
    fields = [put(values, batch) for batch in packed]
    for batch, field in zip(packed, fields, strict=True):
        for row in range(len(field)):
            expected = 0.0
            if batch.loss_mask[row]:
                expected = 100.0 * int(batch.sequence_ids[row]) + 1000 + int(batch.labels[row])
            assert float(field[row]) == expected
    parts = [take(field, batch) for field, batch in zip(fields, packed, strict=True)]
    back = assemble(parts, [len(s.token_ids) for s in whole])
    for sequence, given, found in zip(whole, values, back, strict=True):
        assert found.tolist() == (given * np.array(sequence.loss_mask)).tolist()
