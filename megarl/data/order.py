"""The order of rows: a pure function of (seed, position).

A resumed run needs one integer, the number of rows drawn so far, and no generator state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megarl.data.stream import ExampleStream

_BLOCK = 1024  # draws per block of a mixture


class Order(Protocol):
    """Row indices by position."""

    def batch(self, position: int, n: int) -> list[int]:
        """Return the ``n`` rows from ``position`` on, across any number of epochs."""
        ...


class Ordered(Protocol):
    """A dataset with the properties that decide its order; the sources of a mixture are concatenated."""

    is_mixture: bool

    @property
    def stream(self) -> ExampleStream[Any] | None:
        """The windows it is read in; None if all of it is there."""
        ...

    def __len__(self) -> int: ...

    @property
    def parts(self) -> Sequence[tuple[int, float]]:
        """(size, weight) of each source of a weighted mixture, in the order of its rows; else []."""
        ...


def order_of(data: Ordered, shuffle: bool, seed: int) -> Order:
    """Return the order of ``data`` in a training run."""
    if data.stream is not None:
        return StreamOrder(data.stream, shuffle, seed)
    if data.parts:
        return MixtureOrder([size for size, _ in data.parts], [w for _, w in data.parts], shuffle, seed)
    return PromptOrder(len(data), shuffle, seed)


class PromptOrder:
    """Visits ``num`` rows once per epoch, in a new permutation per epoch (if ``shuffle``).

    Position p is number ``p % num`` of epoch ``p // num``.
    """

    def __init__(self, num: int, shuffle: bool, seed: int) -> None:
        assert num >= 1, "an order needs at least one item"
        self._num = num
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def batch(self, position: int, n: int) -> list[int]:
        """Return the ``n`` rows from ``position`` on."""
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
        return _random(self._seed, epoch).permutation(self._num)


class MixtureOrder:
    """Draws from concatenated sources by weight; each source has its own epochs.

    Draws come in blocks: block b takes the sources at ``(u_b + i) / _BLOCK`` of their cumulative weights
    (systematic sampling, u_b uniform in [0, 1)), permuted. Every block has each source's share to within one
    draw, and the shares are exact in the long run.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], shuffle: bool, seed: int) -> None:
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        # A seed per source, so that two sources of the same size have different permutations.
        self._orders = [PromptOrder(n, shuffle, _mixed(seed, k)) for k, n in enumerate(sizes)]
        self._ends = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))
        self._ends[-1] = 1.0
        self._seed = seed
        self._block = functools.lru_cache(maxsize=4)(self._plan)
        self._drawn = [np.zeros(len(sizes), dtype=np.int64)]  # draws of each source before block b

    def batch(self, position: int, n: int) -> list[int]:
        """Return the ``n`` rows from ``position`` on."""
        items: list[int] = []
        while len(items) < n:
            number, offset = divmod(position + len(items), _BLOCK)
            plan, drawn = self._block(number), self._before(number)
            stop = min(_BLOCK, offset + n - len(items))
            before = np.bincount(plan[:offset], minlength=len(self._orders)) + drawn
            found = np.empty(stop - offset, dtype=np.int64)
            for source, order in enumerate(self._orders):
                here = np.flatnonzero(plan[offset:stop] == source)
                found[here] = np.add(order.batch(int(before[source]), len(here)), self._starts[source])
            items += found.tolist()
        return items

    def _before(self, block: int) -> np.ndarray:
        while len(self._drawn) <= block:
            counts = np.bincount(self._block(len(self._drawn) - 1), minlength=len(self._orders))
            self._drawn.append(self._drawn[-1] + counts)
        return self._drawn[block]

    def _plan(self, block: int) -> np.ndarray:
        random = _random(self._seed, block)
        points = (random.random_sample() + np.arange(_BLOCK)) / _BLOCK
        return random.permutation(np.searchsorted(self._ends, points, side="right"))


class StreamOrder:
    """Visits the windows of a stream in turn, each in a permutation of its own (if ``shuffle``).

    The permutation is a function of the seed, the epoch and the number of the window in it.
    """

    def __init__(self, stream: ExampleStream[Any], shuffle: bool, seed: int) -> None:
        self._stream, self._shuffle, self._seed = stream, shuffle, seed
        self._permuted = functools.lru_cache(maxsize=2)(self._permutation)

    def batch(self, position: int, n: int) -> list[int]:
        """Return the ``n`` examples from ``position`` on."""
        items: list[int] = []
        while len(items) < n:
            at = position + len(items)
            window = self._stream.window(at)
            first, end = window.start.first, min(window.end, position + n)
            if self._shuffle:
                order = self._permuted(window.start.epoch, window.start.number, window.end - first)
                items += (order[at - first : end - first] + first).tolist()
            else:
                items += range(at, end)
        return items

    def _permutation(self, epoch: int, number: int, size: int) -> np.ndarray:
        return _random(self._seed, epoch, number, 2).permutation(size)


def _mixed(seed: int, source: int) -> int:
    return int(np.random.SeedSequence([seed, source, 1]).generate_state(1)[0])


def _random(*seeds: int) -> Any:
    # RandomState, unlike Generator, guarantees the same stream in every numpy version.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seeds))))


def held_out_rows(data: Ordered, n: int) -> list[int]:
    """Return the ``n`` rows to evaluate: the first n; in a mixture evenly spaced, some of each source."""
    total = len(data)
    assert 0 <= n <= total
    return [i * total // n for i in range(n)] if data.is_mixture else list(range(n))
