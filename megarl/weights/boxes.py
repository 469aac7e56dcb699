"""Boxes of index spaces: intersect, subtract, move, merge, and prove tilings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

from megarl.models.table import Box, Index, Region

T = TypeVar("T")


def intersect(a: Box, b: Box) -> Box | None:
    """Return the intersection, or None if it is empty."""
    box = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return box if all(start < stop for start, stop in box) else None


def within(inner: Box, outer: Box) -> bool:
    """Return True if ``outer`` contains ``inner``."""
    return all(b[0] <= a[0] and a[1] <= b[1] for a, b in zip(inner, outer, strict=True))


def subtract(a: Box, hole: Box) -> list[Box]:
    """Return ``a`` without ``hole`` (inside it), as disjoint boxes."""
    rest, core = [], list(a)
    for dim, ((a0, a1), (h0, h1)) in enumerate(zip(a, hole, strict=True)):
        for span in ((a0, h0), (h1, a1)):
            if span[0] < span[1]:
                rest.append((*core[:dim], span, *core[dim + 1 :]))
        core[dim] = (h0, h1)
    return rest


def volume(box: Box) -> int:
    """Return the number of elements."""
    return math.prod(stop - start for start, stop in box)


def as_box(index: Index) -> Box:
    """Convert an index to a box; an int selects one row."""
    return tuple((entry, entry + 1) if isinstance(entry, int) else entry for entry in index)


def move(region: Region, box: Box) -> Index:
    """Return the index of ``box`` (inside region.box) in the region's parameter."""
    if box == region.box:
        return region.index
    index: list[int | tuple[int, int]] = []
    spans = iter(zip(region.box, box, strict=True))
    for entry in region.index:
        if isinstance(entry, int):
            index.append(entry)
        else:
            (origin, _), (start, stop) = next(spans)
            index.append((entry[0] + start - origin, entry[0] + stop - origin))
    return tuple(index)


def merge(pieces: list[T], boxes: Callable[[T], tuple[Box, ...]], join: Callable[[T, T, int], T]) -> list[T]:
    """Join neighbours until none are left.

    ``boxes`` returns a piece's boxes in several index spaces whose dimensions correspond. Two pieces are
    neighbours along a dimension if, in every space, one ends where the other starts and the other dimensions
    agree. ``join(first, second, dim)`` makes one piece of two neighbours.
    """
    if len(pieces) < 2:
        return pieces
    found = [(boxes(piece), piece) for piece in pieces]
    before = 0
    while len(found) != before and len(found) > 1:
        before = len(found)
        for dim in range(len(found[0][0][0])):
            found = _merge_along(dim, found, boxes, join)
    return [piece for _, piece in found]


def _merge_along(
    dim: int,
    pieces: list[tuple[tuple[Box, ...], T]],
    boxes: Callable[[T], tuple[Box, ...]],
    join: Callable[[T, T, int], T],
) -> list[tuple[tuple[Box, ...], T]]:
    merged: list[tuple[tuple[Box, ...], T]] = []
    last: dict[tuple[object, ...], int] = {}  # dimensions that must agree -> index of the piece to extend
    for spaces, piece in sorted(pieces, key=lambda item: item[0][0][dim]):
        start = spaces[0][dim][0]
        key = tuple([(box[:dim], box[dim + 1 :], box[dim][0] - start) for box in spaces])
        position = last.get(key)
        if position is not None and merged[position][0][0][dim][1] == start:
            whole = join(merged[position][1], piece, dim)
            merged[position] = (boxes(whole), whole)
        else:
            last[key] = len(merged)
            merged.append((spaces, piece))
    return merged


def joined(first: Box, second: Box, dim: int) -> Box:
    """Return the union of two neighbours along ``dim``."""
    return (*first[:dim], (first[dim][0], second[dim][1]), *first[dim + 1 :])


@lru_cache(maxsize=65536)
def tiling_problem(target: Box, boxes: tuple[Box, ...]) -> str | None:
    """Return None if every element of ``target`` is in exactly one of ``boxes``, else a description.

    The proof recursively cuts the target where no box crosses the cut, so n boxes of a grid take n log n
    steps; only boxes that no cut separates are compared pairwise.
    """
    for box in boxes:
        if len(box) != len(target) or any(
            not outer[0] <= start < stop <= outer[1]
            for outer, (start, stop) in zip(target, box, strict=False)
        ):
            return f"{_text(box)} does not lie in {_text(target)}"
    return _prove(target, boxes)


def _prove(target: Box, boxes: Sequence[Box]) -> str | None:
    if not boxes:
        return f"nothing covers {_text(target)}"
    if len(boxes) == 1:
        return None if boxes[0] == target else f"{_text(boxes[0])} is all that covers {_text(target)}"
    for dim, (low, high) in enumerate(target):
        groups = _separate(dim, boxes)
        if len(groups) == 1:
            continue
        edge = low
        for number, (start, stop, group) in enumerate(groups):
            if start > edge:
                return f"nothing covers {_text((*target[:dim], (edge, start), *target[dim + 1 :]))}"
            edge = high if number == len(groups) - 1 else stop
            problem = _prove((*target[:dim], (start, edge), *target[dim + 1 :]), group)
            if problem:
                return problem
        return None
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if (both := intersect(box, other)) is not None:
                return f"{_text(both)} is written twice"
    covered = sum(volume(box) for box in boxes)
    return None if covered == volume(target) else f"{volume(target) - covered} elements are not covered"


def _separate(dim: int, boxes: Iterable[Box]) -> list[tuple[int, int, list[Box]]]:
    """Yield groups of boxes (start, stop, boxes) in order; no two groups overlap along ``dim``."""
    groups: list[tuple[int, int, list[Box]]] = []
    for box in sorted(boxes, key=lambda b: b[dim]):
        start, stop = box[dim]
        if groups and start < groups[-1][1]:
            first, end, group = groups[-1]
            group.append(box)
            groups[-1] = (first, max(end, stop), group)
        else:
            groups.append((start, stop, [box]))
    return groups


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
