"""The order against permutations drawn directly, and its purity in (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest

from megarl.data.order import PromptOrder


def plain_order(num: int, seed: int, epochs: int) -> list[int]:
    walk: list[int] = []
    for epoch in range(epochs):
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
        walk += generator.permutation(num).tolist()
    return walk


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_batches_walk_through_plain_permutations(batch_size):
    walk = plain_order(10, seed=4, epochs=12)
    order = PromptOrder(10, shuffle=True, seed=4)
    for position in range(0, 90, batch_size):
        assert order.batch(position, batch_size) == walk[position : position + batch_size]


def test_every_epoch_visits_everything_once_in_an_order_of_its_own():
    order = PromptOrder(50, shuffle=True, seed=1)
    first, second = order.batch(0, 50), order.batch(50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != PromptOrder(50, shuffle=True, seed=2).batch(0, 50)


def test_a_fresh_object_continues_from_an_integer():
    walk = [PromptOrder(13, True, 9).batch(p, 5) for p in range(0, 60, 5)]
    order = PromptOrder(13, True, 9)
    # Asked in another order, and of one object: no hidden state.
    assert [order.batch(p, 5) for p in reversed(range(0, 60, 5))] == walk[::-1]


def test_without_shuffling_the_order_is_the_file_s():
    assert PromptOrder(4, shuffle=False, seed=1).batch(2, 7) == [2, 3, 0, 1, 2, 3, 0]
