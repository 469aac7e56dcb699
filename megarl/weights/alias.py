"""Decide when an engine parameter can alias the trainer's memory."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.weights.boxes import as_box
from megarl.weights.sync_plan import ParamInfo, SourceView, Storage

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def alias_of(
    info: ParamInfo, pieces: Sequence[tuple[object, SourceView]], storages: Sequence[Storage]
) -> SourceView | str:
    """Return the one view that is the whole parameter, given pieces (index, source), or why there is none."""
    first = pieces[0][1]
    if any(source.dtype != info.dtype for _, source in pieces):
        return f"the trainer stores {first.dtype}, the engine {info.dtype}"
    if any(source.storage != first.storage for _, source in pieces):
        return "its parts lie with several trainer ranks or parameters"
    strides = contiguous_stride(info.shape)
    origins = set()
    for index, source in pieces:
        assert isinstance(index, tuple)
        own = [step for step, entry in zip(strides, index, strict=True) if not isinstance(entry, int)]
        # The stride of a dimension of size 1 is irrelevant.
        if any(a != b for a, b, size in zip(own, source.stride, source.shape, strict=True) if size > 1):
            return "its rows are laid out differently in the trainer"
        start = sum(box[0] * step for box, step in zip(as_box(index), strides, strict=True))
        origins.add(source.offset - start)
    if len(origins) > 1:
        return "its parts are fused in another order in the trainer"
    (origin,) = origins
    elements = strides[0] * info.shape[0] if info.shape else 1
    if origin < 0 or (origin + elements) * ITEM_BYTES[info.dtype] > storages[first.storage].num_bytes:
        return "the trainer's memory block ends before the engine's padding does"
    return SourceView(first.storage, info.dtype, origin, info.shape, strides)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()
