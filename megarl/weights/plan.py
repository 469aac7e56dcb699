"""From "who owns which region" to "what each engine parameter does": alias or copy.

Pure planning: no process groups, no tensors. The trainer's regions of all ranks are intersected
with the engine's, in the index space of the Hugging Face tensors; the plan proves that every element
of every engine parameter is written exactly once (vocabulary padding excepted).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from megarl.errors import UserError
from megarl.models.table import Box, Region
from megarl.weights.handover import Alias, Copy, ParamInfo, SharedStorage, SourceView, WeightPlan


@dataclass(frozen=True, slots=True)
class Owner:
    """One trainer rank's offer: its regions, where its parameters lie, and its shared storages."""

    regions: list[Region]
    params: dict[str, SourceView]
    storages: list[SharedStorage]


def plan_weights(
    owners: list[Owner], readers: list[Region], engine_params: Mapping[str, ParamInfo]
) -> WeightPlan:
    """Plan one engine rank. Where several trainer ranks own the same bytes the first is read.

    Raises UserError listing every parameter that is unknown, misshapen or not covered.
    """
    storages: list[SharedStorage] = []
    base = []
    for owner in owners:
        base.append(len(storages))
        storages += owner.storages
    offers: dict[str, list[tuple[int, Region]]] = defaultdict(list)
    for rank, owner in enumerate(owners):
        for region in owner.regions:
            offers[region.hf].append((rank, region))

    pieces: dict[str, list[Copy]] = {name: [] for name in engine_params}
    problems = []
    for reader in readers:
        if reader.param not in pieces:
            problems.append(f"weights: the engine has no parameter {reader.param} for tensor {reader.hf}")
            continue
        left = [reader.box]
        for rank, offer in offers[reader.hf]:
            remaining: list[Box] = []
            for want in left:
                shared = _intersect(want, offer.box)
                if shared is None:
                    remaining.append(want)
                    continue
                view = _subview(owners[rank].params[offer.param], offer, shared, base[rank])
                pieces[reader.param].append(Copy(reader.param, _shift(reader, shared), view))
                remaining += _subtract(want, shared)
            left = remaining
        problems += [f"weights: no trainer rank owns {reader.hf}{list(box)}" for box in left]

    aliases, copies, reasons = [], [], {}
    for name, info in engine_params.items():
        problems += _coverage(name, info, pieces[name])
        answer = _as_alias(name, info, pieces[name], storages)
        if isinstance(answer, Alias):
            aliases.append(answer)
        else:
            copies += pieces[name]
            reasons[name] = answer
    if problems:
        raise UserError("\n".join(problems))
    return WeightPlan(storages, aliases, copies, reasons)


def _intersect(a: Box, b: Box) -> Box | None:
    box = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return box if all(start < stop for start, stop in box) else None


def _subtract(a: Box, hole: Box) -> list[Box]:
    """What is left of ``a`` without ``hole`` (which lies inside it), as disjoint boxes."""
    rest, core = [], list(a)
    for dim, ((a0, a1), (h0, h1)) in enumerate(zip(a, hole, strict=True)):
        for span in ((a0, h0), (h1, a1)):
            if span[0] < span[1]:
                rest.append((*core[:dim], span, *core[dim + 1 :]))
        core[dim] = (h0, h1)
    return rest


def _shift(region: Region, box: Box) -> tuple[int | tuple[int, int], ...]:
    """Where ``box`` (inside region.box) lies in the region's parameter."""
    index: list[int | tuple[int, int]] = []
    spans = iter(zip(region.box, box, strict=True))
    for entry in region.index:
        if isinstance(entry, int):
            index.append(entry)
        else:
            (origin, _), (start, stop) = next(spans)
            index.append((entry[0] + start - origin, entry[0] + stop - origin))
    return tuple(index)


def _subview(param: SourceView, region: Region, box: Box, base: int) -> SourceView:
    offset, shape, stride = param.offset, [], []
    for entry, step in zip(_shift(region, box), param.stride, strict=True):
        offset += (entry if isinstance(entry, int) else entry[0]) * step
        if not isinstance(entry, int):
            shape.append(entry[1] - entry[0])
            stride.append(step)
    return SourceView(base + param.storage, param.dtype, offset, tuple(shape), tuple(stride))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def _size(index: tuple[int | tuple[int, int], ...]) -> int:
    return math.prod(1 if isinstance(entry, int) else entry[1] - entry[0] for entry in index)


def _coverage(name: str, info: ParamInfo, pieces: list[Copy]) -> list[str]:
    """Pieces come from disjoint boxes of disjoint regions, so that equal counts mean each element once."""
    total = math.prod(info.shape)
    covered = sum(_size(piece.index) for piece in pieces)
    for piece in pieces:
        for entry, size in zip(piece.index, info.shape, strict=True):
            stop = entry + 1 if isinstance(entry, int) else entry[1]
            if stop > size:
                return [f"weights: engine parameter {name} {list(info.shape)} does not reach {piece.index}"]
    if covered == total or (name.endswith(_VOCAB_PARAMS) and covered and covered <= total):
        return []
    return [f"weights: {covered} of {total} elements of engine parameter {name} have an owner"]


_VOCAB_PARAMS = ("embed_tokens.weight", "lm_head.weight")
"""Their last rows may be padding that no tensor owns and no result reads."""


def _as_alias(name: str, info: ParamInfo, pieces: list[Copy], storages: list[SharedStorage]) -> Alias | str:
    """The alias that serves the whole parameter, or the reason why there is none."""
    if not pieces:
        return "nothing to read"
    first = pieces[0].source
    if any(piece.source.dtype != info.dtype for piece in pieces):
        return f"the trainer stores {first.dtype}, the engine {info.dtype}"
    if any(piece.source.storage != first.storage for piece in pieces):
        return "its parts lie with several trainer ranks or parameters"
    strides = contiguous_stride(info.shape)
    origins = set()
    for piece in pieces:
        own = tuple(s for s, entry in zip(strides, piece.index, strict=True) if not isinstance(entry, int))
        # The stride of a dimension of size 1 means nothing.
        if any(
            a != b
            for a, b, size in zip(own, piece.source.stride, piece.source.shape, strict=True)
            if size > 1
        ):
            return "its rows are laid out differently in the trainer"
        start = sum(
            (e if isinstance(e, int) else e[0]) * s for e, s in zip(piece.index, strides, strict=True)
        )
        origins.add(piece.source.offset - start)
    if len(origins) > 1:
        return "its parts are fused in another order in the trainer"
    (origin,) = origins
    elements = strides[0] * info.shape[0] if info.shape else 1
    if origin < 0 or (origin + elements) * _ITEM_BYTES[info.dtype] > storages[first.storage].num_bytes:
        return "the trainer's memory block ends before the engine's padding does"
    return Alias(name, SourceView(first.storage, info.dtype, origin, info.shape, strides))


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
