"""The order in which problems are drawn: a pure function of (seed, position)."""

from __future__ import annotations

import functools

import numpy as np


class PromptOrder:
    """Walks through ``num`` items, epoch after epoch, each epoch in an order of its own.

    Position p is item ``p % num`` of epoch ``p // num``. A resumed run therefore needs one integer,
    the number of items drawn so far, and no generator state.
    """

    def __init__(self, num: int, shuffle: bool, seed: int) -> None:
        assert num >= 1, "an order needs at least one item"
        self._num = num
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def batch(self, position: int, n: int) -> list[int]:
        """The ``n`` items after the first ``position``; it may cross any number of epoch borders."""
        assert position >= 0
        assert n >= 0
        items: list[int] = []
        while len(items) < n:
            epoch, offset = divmod(position + len(items), self._num)
            items += self._epoch(epoch)[offset : offset + n - len(items)].tolist()
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._num)
        # RandomState, unlike Generator, promises the same stream in every numpy version.
        seeded = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(seeded).permutation(self._num)
