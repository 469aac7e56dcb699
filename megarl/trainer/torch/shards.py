"""Part of every whole tensor that a rank holds after tensor parallelism and FSDP have split it.

Everything that leaves or enters a rank by name (loading, weight sync, checkpoints, export) goes through
these parts, so that no layout needs a whole tensor anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megarl.models.table import Box, Region


@dataclass(frozen=True, slots=True)
class Split:
    """A dimension shared by tensor ranks: ``parts`` of it [(start, stop), ...] lie on this one, in order."""

    dim: int
    parts: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Of the dimension on this rank."""
        return sum(stop - start for start, stop in self.parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """``whole[at]`` is ``local[here]``; boxes of equal shape."""

    at: Box
    here: Box

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(stop - start for start, stop in self.at)


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's part of one tensor of shape ``whole``: ``chunks`` tile its local tensor.

    ``copies`` ranks hold the same values. ``first``: this rank is the one of them that speaks for all.
    """

    whole: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    copies: int = 1
    first: bool = True


def chunks_of(
    whole: tuple[int, ...], split: Split | None, rows: tuple[int, int] | None = None
) -> tuple[Chunk, ...]:
    """Chunks of a tensor that tensor ranks share by ``split``, of which FSDP left the first dimension's rows.

    ``rows`` [start, stop) count within what tensor parallelism left here; None: all.
    """
    everything = tuple((0, size) for size in whole)
    pieces: list[Chunk] = []
    if split is None:
        pieces = [Chunk(everything, everything)]
    else:
        begin = 0
        for start, stop in split.parts:
            at, here = list(everything), list(everything)
            at[split.dim], here[split.dim] = (start, stop), (begin, begin + stop - start)
            pieces.append(Chunk(tuple(at), tuple(here)))
            begin += stop - start
    if rows is not None:
        pieces = [cut for piece in pieces if (cut := _rows(piece, *rows)) is not None]
    return tuple(pieces)


def _rows(chunk: Chunk, start: int, stop: int) -> Chunk | None:
    """The part of a chunk whose local rows lie in [start, stop), counted from there."""
    low, high = max(chunk.here[0][0], start), min(chunk.here[0][1], stop)
    if low >= high:
        return None
    shift = chunk.at[0][0] - chunk.here[0][0]
    return Chunk(((low + shift, high + shift), *chunk.at[1:]), ((low - start, high - start), *chunk.here[1:]))


def local_regions(regions: Iterable[Region], parts: Mapping[str, Part]) -> list[Region]:
    """Of ``regions`` of whole parameters, what lies in this rank's: their indices count in local tensors."""
    found = []
    for region in regions:
        for chunk in parts[region.param].chunks:
            if (cut := _intersection(region, chunk)) is not None:
                found.append(cut)
    return found


def _intersection(region: Region, chunk: Chunk) -> Region | None:
    box: list[tuple[int, int]] = []
    index: list[int | tuple[int, int]] = []
    dims = iter(region.box)
    for entry, (at, stop), (here, _) in zip(region.index, chunk.at, chunk.here, strict=True):
        start, end = (entry, entry + 1) if isinstance(entry, int) else entry
        low, high = max(start, at), min(end, stop)
        if low >= high:
            return None
        if isinstance(entry, int):
            index.append(low - at + here)
        else:
            origin = next(dims)[0]
            index.append((low - at + here, high - at + here))
            box.append((origin + low - start, origin + high - start))
    return Region(region.hf, tuple(box), region.param, tuple(index))
