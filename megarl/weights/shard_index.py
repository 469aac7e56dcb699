"""Index of shards: the pieces of each engine parameter, and the trainer ranks that hold each.

This half of the planner knows regions only. It does not depend on where an engine rank runs, so one result
serves all engine ranks with the same regions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megarl.models.table import Box, Index, Region
from megarl.weights.boxes import (
    as_box,
    intersect,
    joined,
    merge,
    move,
    subtract,
    tiling_problem,
    volume,
    within,
)
from megarl.weights.sync_plan import ParamInfo, PeerCopy

VOCAB_PARAMS = ("embed_tokens.weight", "lm_head.weight")
"""Parameters whose last rows may be padding that no tensor owns and no result reads."""


class ReplicaSet:
    """Owners that hold the same bytes, by owner id (index in the list of owners). Equal sets are one object.

    The object is its own key in tables: identity is equality.
    """

    def __init__(
        self, owner_ids: tuple[int, ...], hosts: Sequence[str], interned: dict[tuple[int, ...], ReplicaSet]
    ):
        self.owner_ids, self.members = owner_ids, frozenset(owner_ids)
        self._hosts, self._interned = hosts, interned
        self._on_host: dict[str, ReplicaSet] | None = None
        self._narrowed: dict[tuple[ReplicaSet, ...], ReplicaSet] = {}

    def __len__(self) -> int:
        return len(self.owner_ids)

    def _of(self, owner_ids: Iterable[int]) -> ReplicaSet:
        return intern(tuple(owner_ids), self._hosts, self._interned)

    def only(self, owner_id: int) -> ReplicaSet:
        """Return the set of this owner alone."""
        return self._of((owner_id,))

    def on_host(self, host: str) -> ReplicaSet | None:
        """Return the owners on one host, None if there are none."""
        if self._on_host is None:
            by_host: dict[str, list[int]] = defaultdict(list)
            for owner_id in self.owner_ids:
                by_host[self._hosts[owner_id]].append(owner_id)
            self._on_host = {name: self._of(owner_ids) for name, owner_ids in by_host.items()}
        return self._on_host.get(host)

    def narrowed(self, others: Sequence[ReplicaSet]) -> ReplicaSet:
        """Intersect with each of ``others`` in turn, skipping those that would leave no owner."""
        key = tuple(others)
        if key not in self._narrowed:
            members = self.members
            for other in others:
                members = (members & other.members) or members
            self._narrowed[key] = self._of(owner_id for owner_id in self.owner_ids if owner_id in members)
        return self._narrowed[key]


def intern(
    owner_ids: tuple[int, ...], hosts: Sequence[str], interned: dict[tuple[int, ...], ReplicaSet]
) -> ReplicaSet:
    """Return the unique object for these owners."""
    if owner_ids not in interned:
        interned[owner_ids] = ReplicaSet(owner_ids, hosts, interned)
    return interned[owner_ids]


@dataclass(frozen=True, slots=True)
class Source:
    """``param[index]`` in the memory of these holders."""

    holders: ReplicaSet
    param: str
    index: Index


@dataclass(frozen=True, slots=True)
class Piece:
    """``index`` of an engine parameter, and its holders (several sources: under different names)."""

    index: Index
    size: int  # elements
    holders: ReplicaSet
    sources: tuple[Source, ...]
    peer_copies: dict[int, PeerCopy] = field(default_factory=dict, compare=False)  # by owner_id

    def source_of(self, owner_id: int) -> tuple[str, Index]:
        """Return the parameter and index under which the owner holds this piece."""
        for source in self.sources:
            if owner_id in source.holders.members:
                return source.param, source.index
        raise AssertionError(owner_id)


class PieceSenders(NamedTuple):
    """The possible senders of one piece, given where the engine rank runs."""

    number: int  # index of the piece
    candidates: ReplicaSet
    narrowed: ReplicaSet  # those that can also send other pieces
    mapped: bool


PieceTemplate = tuple[Index, int, list[tuple[int, Index]]]
"""A piece without its holders: index, elements, and (source id, index there) of each source."""


@dataclass(eq=False, slots=True)
class ParamPieces:
    """The pieces of one parameter, for all engine ranks of a kind. A key of tables, compared by identity."""

    pieces: list[Piece]
    common: frozenset[int]  # owners that hold all of them


@dataclass(frozen=True, slots=True)
class ReaderPieces:
    """The pieces of every parameter of one kind of engine rank."""

    params: dict[str, ParamPieces]
    padding: dict[str, int]  # rows at the end of a vocabulary parameter without a tensor
    problems: list[str]
    num_pieces: int


class ShardIndex:
    """All owners' regions by tensor and box, replicas merged."""

    def __init__(self, owners: Sequence[tuple[list[Region], str]]) -> None:
        self._hosts = [host for _, host in owners]
        self._interned: dict[tuple[int, ...], ReplicaSet] = {}
        replicas: dict[int, tuple[list[Region], list[int]]] = {}  # replicas may share one list
        for owner_id, (regions, _) in enumerate(owners):
            replicas.setdefault(id(regions), (regions, []))[1].append(owner_id)
        found: dict[str, dict[Box, dict[tuple[str, Index], list[int]]]] = {}
        for regions, owner_ids in replicas.values():
            for region in regions:
                boxes = found.setdefault(region.hf, {})
                held = boxes.setdefault(region.box, {})
                held.setdefault((region.param, region.index), []).extend(owner_ids)
        self._sources = {
            hf: [
                (Region(hf, box, param, index), intern(tuple(sorted(owner_ids)), self._hosts, self._interned))
                for box, held in boxes.items()
                for (param, index), owner_ids in held.items()
            ]
            for hf, boxes in found.items()
        }
        splits: dict[tuple[tuple[Box, Index], ...], int] = {}
        self._splits = {
            hf: splits.setdefault(tuple((region.box, region.index) for region, _ in sources), len(splits))
            for hf, sources in self._sources.items()
        }
        self._templates: dict[tuple[object, ...], list[PieceTemplate]] = {}
        self._in_common: dict[tuple[ReplicaSet, ...], frozenset[int]] = {}

    def reader_pieces(self, readers: Sequence[Region], params: Mapping[str, ParamInfo]) -> ReaderPieces:
        """Cut the readers' regions into pieces that one owner holds whole; merge what one copy can cover."""
        wanted: dict[str, list[Region]] = {name: [] for name in params}
        problems = []
        for reader in readers:
            if reader.param in wanted:
                wanted[reader.param].append(reader)
            else:
                problems.append(f"weights: the engine has no parameter {reader.param} for tensor {reader.hf}")
        found: dict[str, ParamPieces] = {}
        padding = {}
        for name, regions in wanted.items():
            pieces, missing = self._pieces(regions)
            problems += missing
            found[name] = ParamPieces(pieces, self._common(pieces))
            shape = params[name].shape
            if name.endswith(VOCAB_PARAMS) and (rows := self._padding(regions, shape[0])) > 0:
                padding[name] = rows
            boxes = tuple([as_box(piece.index) for piece in pieces])
            problems += cover_problem(name, shape, boxes, padding.get(name, 0))
        return ReaderPieces(found, padding, problems, sum(len(each.pieces) for each in found.values()))

    def _common(self, pieces: list[Piece]) -> frozenset[int]:
        """Return the owners that hold all these pieces; cached, since most layers have the same."""
        key = tuple(dict.fromkeys(piece.holders for piece in pieces))
        if key not in self._in_common:
            sets = [holders.members for holders in key]
            self._in_common[key] = frozenset.intersection(*sets) if sets else frozenset()
        return self._in_common[key]

    def _padding(self, readers: Sequence[Region], rows: int) -> int:
        """Return how many rows of a vocabulary parameter follow its tensor's last (0 if elsewhere)."""
        padding = 0
        for reader in readers:
            vocabulary = max((region.box[0][1] for region, _ in self._sources.get(reader.hf, ())), default=0)
            last = reader.index[0]
            if reader.box[0][1] == vocabulary and not isinstance(last, int):
                padding = rows - last[1]
        return padding

    def _pieces(self, readers: Sequence[Region]) -> tuple[list[Piece], list[str]]:
        """Return the pieces of one parameter, and a line for each part without an owner.

        Most layers, and most ranks' experts, are cut alike and differ only in the holders and names of the
        pieces. Each way of cutting is therefore computed once.
        """
        source_ids: dict[tuple[ReplicaSet, str], int] = {}  # (holders, their parameter) -> id
        alike: list[object] = []
        for reader in readers:
            alike.append((reader.box, reader.index, self._splits.get(reader.hf)))
            for region, holders in self._sources.get(reader.hf, ()):
                alike.append(source_ids.setdefault((holders, region.param), len(source_ids)))
        key = tuple(alike)
        if key in self._templates:
            made_of = list(source_ids)
            return [self._from_template(template, made_of) for template in self._templates[key]], []
        cuts = [(reader, *self._cut(reader)) for reader in readers]
        problems = [
            f"weights: no trainer rank owns {reader.hf}{list(box)}"
            for reader, _, left in cuts
            for box in left
        ]
        merged = self._merge([piece for _, pieces, _ in cuts for piece in pieces])
        if not problems:
            self._templates[key] = [
                (piece.index, piece.size, [(source_ids[o.holders, o.param], o.index) for o in piece.sources])
                for piece in merged
            ]
        return merged, problems

    def _from_template(self, template: PieceTemplate, source_ids: list[tuple[ReplicaSet, str]]) -> Piece:
        index, size, parts = template
        sources = tuple([Source(*source_ids[number], part) for number, part in parts])
        return Piece(index, size, self._union(sources), sources)

    def _cut(self, reader: Region) -> tuple[list[Piece], list[Box]]:
        """Return the pieces of one region, large ones first to have few, and boxes without an owner."""
        sources = self._sources.get(reader.hf, [])
        if len(sources) == 1 and within(reader.box, sources[0][0].box):
            region, holders = sources[0]
            source = Source(holders, region.param, move(region, reader.box))
            return [Piece(reader.index, volume(reader.box), holders, (source,))], []
        shared = {both for region, _ in sources if (both := intersect(reader.box, region.box)) is not None}
        boxes, left = [], [reader.box]
        for box in sorted(shared, key=lambda b: (-volume(b), b)):
            remaining = []
            for want in left:
                both = intersect(want, box)
                if both is None:
                    remaining.append(want)
                else:
                    boxes.append(both)
                    remaining += subtract(want, both)
            left = remaining
        pieces = []
        for box in boxes:
            having = tuple(
                Source(holders, region.param, move(region, box))
                for region, holders in sources
                if intersect(region.box, box) == box
            )
            pieces.append(Piece(move(reader, box), volume(box), self._union(having), having))
        return pieces, left

    def _union(self, sources: Sequence[Source]) -> ReplicaSet:
        if len(sources) == 1:
            return sources[0].holders
        owner_ids = sorted({owner_id for source in sources for owner_id in source.holders.owner_ids})
        return intern(tuple(owner_ids), self._hosts, self._interned)

    def _merge(self, pieces: list[Piece]) -> list[Piece]:
        alike: dict[tuple[object, ...], list[Piece]] = defaultdict(list)
        done = []
        for piece in pieces:
            stacked = [dim for dim, entry in enumerate(piece.index) if isinstance(entry, int)]
            if all(
                [dim for dim, entry in enumerate(source.index) if isinstance(entry, int)] == stacked
                for source in piece.sources
            ):
                key = (len(piece.index), *((source.holders, source.param) for source in piece.sources))
                alike[key].append(_with_spans(piece))
            else:  # stacked on one side only: no dimension to join along
                done.append(piece)
        for group in alike.values():
            done += merge(group, _spaces, _join)
        return done


def cover_problem(name: str, shape: tuple[int, ...], boxes: tuple[Box, ...], padding: int) -> list[str]:
    """Return a line if the boxes do not tile the parameter without its padding rows."""
    whole = tuple((0, size) for size in shape)
    for box in boxes:
        if len(box) != len(shape) or any(stop > size for (_, stop), size in zip(box, shape, strict=True)):
            return [f"weights: engine parameter {name} {list(shape)} does not reach {box}"]
    target = ((0, shape[0] - padding), *whole[1:]) if padding else whole
    problem = tiling_problem(target, boxes)
    if problem is None:
        return []
    covered, total = sum(volume(box) for box in boxes), math.prod(shape)
    return [f"weights: {covered} of {total} elements of engine parameter {name} have an owner: {problem}"]


def _with_spans(piece: Piece) -> Piece:
    if not any(isinstance(entry, int) for entry in piece.index):
        return piece
    sources = tuple(Source(source.holders, source.param, as_box(source.index)) for source in piece.sources)
    return Piece(as_box(piece.index), piece.size, piece.holders, sources)


def _spaces(piece: Piece) -> tuple[Box, ...]:
    return (as_box(piece.index), *(as_box(source.index) for source in piece.sources))


def _join(first: Piece, second: Piece, dim: int) -> Piece:
    sources = tuple(
        Source(one.holders, one.param, joined(as_box(one.index), as_box(other.index), dim))
        for one, other in zip(first.sources, second.sources, strict=True)
    )
    index = joined(as_box(first.index), as_box(second.index), dim)
    return Piece(index, first.size + second.size, first.holders, sources)
