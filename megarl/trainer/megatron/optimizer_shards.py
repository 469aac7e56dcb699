"""A data-parallel rank's share of a distributed optimizer's state, as pieces of the model's tensors.

Before a save, Megatron (``fully_reshardable``) gathers the state of all data-parallel ranks on each of them,
into tensors without the padding between buckets, but cuts them at offsets that include it: with several
buckets the states of parameters are mixed up. Here Megatron only describes the tensors, none is gathered, and
each rank writes what it holds: a range of a parameter in row-major order is a few boxes of it. Megatron reads
the result like its own files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_ADAM = ("param", "exp_avg", "exp_avg_sq")
"""The state of Adam's distributed optimizer per parameter, under Megatron's names."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes."""


@dataclass(slots=True)
class _BufferRanges:
    """Ranges of one flat buffer that this rank holds, in order: their offsets and values."""

    starts: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def distributed_parts(optimizer: Any | None) -> list[DistributedOptimizer]:
    """Return the distributed optimizers among an optimizer's parts; empty without an optimizer."""
    chained = [] if optimizer is None else optimizer.chained_optimizers
    return [part for part in chained if isinstance(part, DistributedOptimizer)]


class OptimizerShards:
    """This rank's state of the distributed optimizers of one model, if any."""

    def __init__(self, optimizer: Any | None) -> None:
        self._parts = distributed_parts(optimizer)
        self._wholes: list[torch.Tensor] = []  # without values, one per flat buffer and kind of state
        self._held: dict[int, _BufferRanges] = {}  # by the storage of that tensor

    @contextmanager
    def described(self) -> Iterator[None]:
        """Inside, Megatron describes the optimizers' state with tensors without values."""
        with _buffers_by(self._parts, self._without_values):
            yield

    def _without_values(self, part: DistributedOptimizer, key: str, index: int) -> torch.Tensor:
        buffer = part.buffers[index]
        whole = torch.empty(buffer.numel, dtype=torch.float32, device="meta")
        self._wholes.append(whole)
        held = self._held[_storage(whole)] = _BufferRanges()
        own = []
        for ranges in part.gbuf_ranges[index].values():
            for bucket in ranges:
                for param, where in bucket["param_map"].items():
                    begin = buffer.param_index_map[param][0] + where["param"].start
                    own.append((begin, part._get_main_param_and_optimizer_states(param)[key]))
        for begin, values in sorted(own, key=lambda pair: pair[0]):
            held.starts.append(begin)
            held.values.append(values.detach().view(-1))
        return whole

    def holds(self, part: ShardedTensor) -> bool:
        """Return True if ``part`` was described here, so :meth:`pieces` has its values."""
        return part.data.is_meta

    def pieces(self, part: ShardedTensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield this rank's pieces of a described tensor: offset in the global tensor, and values."""
        *replica, _ = part.replica_id
        if not is_main_replica(
            (*replica, 0)
        ):  # data-parallel ranks hold different pieces, other ranks the same
            return
        held, view = self._held[_storage(part.data)], part.data
        first = max(0, bisect_right(held.starts, view.storage_offset()) - 1)
        for begin, values in zip(held.starts[first:], held.values[first:], strict=True):
            span = (_count_before(view, begin), _count_before(view, begin + values.numel()))
            if span[0] == view.numel():
                return
            for offset, sizes in boxes(tuple(view.shape), *span):
                start = view.storage_offset() + sum(
                    o * stride for o, stride in zip(offset, view.stride(), strict=True)
                )
                piece = values.as_strided(sizes, view.stride(), values.storage_offset() + start - begin)
                prepended = part.prepend_axis_num
                local = (0,) * prepended + offset
                where = tuple(g + o for g, o in zip(part.global_offset, local, strict=True))
                yield where, piece.reshape((1,) * prepended + sizes)


@contextmanager
def read_whole(optimizer: Any) -> Iterator[None]:
    """Inside, Megatron describes the optimizers' state with empty host memory to read into."""

    def zeros(part: DistributedOptimizer, key: str, index: int) -> torch.Tensor:
        return torch.zeros(part.buffers[index].numel, dtype=torch.float32, device="cpu")

    with _buffers_by(distributed_parts(optimizer), zeros):
        yield


@contextmanager
def _buffers_by(parts: list[Any], make: Any) -> Iterator[None]:
    """Have ``make`` provide the flat tensors, padding included, that Megatron cuts into parameters."""

    def state_of(part: Any) -> Any:
        def state(**_: Any) -> dict[Any, Any]:
            return {"buckets_coalesced": True} | {
                index: {dtype: {key: make(part, key, index) for key in _ADAM} for dtype in ranges}
                for index, ranges in enumerate(part.gbuf_ranges)
            }

        return state

    for part in parts:
        part.get_parameter_state_dp_zero = state_of(part)  # shadows the class's method
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _count_before(view: torch.Tensor, address: int) -> int:
    """Count the elements of ``view``, whose strides are descending, before ``address``."""
    count, rest = 0, address - view.storage_offset()
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        index = min(max(rest, 0) // stride, size)
        count += index * math.prod(view.shape[dim + 1 :])
        if index == size:
            break
        rest -= index * stride
        if dim == view.dim() - 1 and rest > 0:  # a range that begins between two elements
            count += 1
    return count


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield elements [start, stop) of a tensor in row-major order as boxes, fewer than two per dimension."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if head:
        inner = boxes(shape[1:], head, tail if first == last else row)
        yield from (((first, *offset), (1, *sizes)) for offset, sizes in inner)
        if first == last:
            return
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        yield from (((last, *offset), (1, *sizes)) for offset, sizes in boxes(shape[1:], 0, tail))
