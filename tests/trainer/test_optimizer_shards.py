"""Ranges of flat buffers as boxes of tensors, against a tensor of element numbers."""

from __future__ import annotations

import itertools

import pytest
import torch


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5, 1), (2, 1, 3, 2)])
def test_boxes_are_the_stretch(shape: tuple[int, ...]) -> None:
    from megarl.trainer.megatron.optimizer_shards import boxes

    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        elements = [
            whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found
        ]
        assert torch.equal(
            torch.cat([torch.empty(0, dtype=torch.int64), *elements]), torch.arange(start, stop)
        )
        assert len(found) < 2 * len(shape)


@pytest.mark.parametrize("part", [0, 1])
def test_elements_of_a_part_before_an_address(part: int) -> None:
    """Gate or up rows of stacked experts: every other block of the buffer, which begins at 5."""
    from megarl.trainer.megatron.optimizer_shards import _count_before

    buffer = torch.arange(40)
    view = buffer[5:29].view(2, 4, 3).chunk(2, dim=1)[part]
    for address in range(40):
        assert _count_before(view, address) == int((view < address).sum())
