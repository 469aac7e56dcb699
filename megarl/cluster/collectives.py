"""Collectives of the control group: Python values, barriers, and tensors to be written to disk.

They use a separate gloo group on every platform; NCCL carries the tensors of a step only. A waiting NCCL
collective is a kernel that spins on the GPU, which the engine needs while other ranks wait for rank 0's
rollout, and it fails after the group's timeout, although a rollout has no time limit. These collectives have
no timeout: heartbeats detect dead or stuck ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from megarl import platform
from megarl.errors import ToldByRankZeroError, UserError
from megarl.platform import spans

Result = TypeVar("Result")

_NO_LIMIT = timedelta(days=365)
_groups: list[dist.ProcessGroup] = []  # one between join() and leave()


def join() -> None:
    """Create the group; collective, after the default process group has been initialised."""
    assert not _groups, "the control group exists already"
    if dist.get_world_size() > 1:
        _groups.append(dist.new_group(backend="gloo", timeout=_NO_LIMIT))


def leave() -> None:
    """Drop the group; it is destroyed with the default one."""
    _groups.clear()


def gather(value: Any) -> list[Any]:
    """All-gather a picklable value: return the values of all ranks, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with spans.span(spans.WAIT):
        dist.all_gather_object(values, value, group=_groups[0])
    return values


def gather_to_first_rank(value: Any) -> list[Any]:
    """Gather a picklable value to rank 0: return all values in rank order there, [] elsewhere."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    with spans.span(spans.WAIT):
        dist.gather_object(value, values, dst=0, group=_groups[0])
    return values or []


def broadcast(value: Any) -> Any:
    """Broadcast a picklable value: return rank 0's (the argument of other ranks is ignored)."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    with spans.span(spans.WAIT):
        dist.broadcast_object_list(box, src=0, group=_groups[0])
    return box[0]


def from_first_rank(make: Callable[[], Result]) -> Result:
    """Call ``make`` on rank 0 only and broadcast its (picklable) result.

    Raises:
        UserError: ``make`` raised it on rank 0; raised on every rank, so that none waits for rank 0.
    """
    if dist.get_world_size() == 1:
        return make()
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = make()
        except UserError as raised:
            error = raised
    result, message = broadcast((result, None if error is None else str(error)))
    if error is not None:
        raise error
    if message is not None:
        raise ToldByRankZeroError(message)
    return cast("Result", result)


def on_first_rank(make: Callable[[], Result]) -> Result | None:
    """Call ``make`` on rank 0 only; return its result there, None elsewhere.

    Raises:
        UserError: as in :func:`from_first_rank`.
    """
    kept: list[Result] = []
    from_first_rank(lambda: kept.append(make()))
    return kept[0] if kept else None


def barrier() -> None:
    """Return when every rank has called it; unlike a broadcast, whose source need not wait."""
    gather(None)


def wait_for_devices() -> None:
    """Return when the devices of all ranks have finished all launched work.

    Stream order is enough between ranks, but not for an engine: it is another process and reads the device
    memory of every rank.
    """
    platform.synchronize()
    barrier()


def send_to_first_rank(tensor: torch.Tensor) -> None:
    """Send a tensor in host memory to rank 0, which calls :func:`receive`; not called by rank 0."""
    dist.send(tensor.contiguous(), dst=0, group=_groups[0])


def receive(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On rank 0: receive the next tensor from ``rank``, of this shape and dtype, into host memory."""
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(tensor, src=rank, group=_groups[0])
    return tensor


# --- arrays as raw bytes; only names, dtypes and shapes are pickled ---------------------------------------

_ALIGNMENT = 8  # bytes, of each array in a message


def send_arrays(arrays: Mapping[str, np.ndarray | None], to: int) -> int:
    """Send named arrays (None: absent) to rank ``to``, which calls :func:`receive_arrays`.

    Two messages: the sizes, then one buffer. Returns the number of array bytes.
    """
    message, header, num_bytes = packed_arrays(arrays)
    dist.send(torch.tensor([len(message), header]), dst=to, group=_groups[0])
    dist.send(torch.from_numpy(message), dst=to, group=_groups[0])
    return num_bytes


def receive_arrays(source: int) -> dict[str, np.ndarray]:
    """Receive the next arrays from rank ``source``, as views of one buffer."""
    sizes = torch.empty(2, dtype=torch.int64)
    with spans.span(spans.WAIT):
        dist.recv(sizes, src=source, group=_groups[0])
    length, header = sizes.tolist()
    message = torch.empty(length, dtype=torch.uint8)
    dist.recv(message, src=source, group=_groups[0])
    return unpacked_arrays(message.numpy(), header)


def broadcast_arrays(arrays: Mapping[str, np.ndarray | None] | None) -> dict[str, np.ndarray]:
    """Broadcast rank 0's named arrays (the argument of other ranks is ignored)."""
    if dist.get_world_size() == 1:
        assert arrays is not None
        return {name: values for name, values in arrays.items() if values is not None}
    message, sizes = np.zeros(0, np.uint8), torch.zeros(2, dtype=torch.int64)
    if dist.get_rank() == 0:
        message, header, _ = packed_arrays(arrays or {})
        sizes = torch.tensor([len(message), header])
    with spans.span(spans.WAIT):
        dist.broadcast(sizes, src=0, group=_groups[0])
    message = message if dist.get_rank() == 0 else np.empty(int(sizes[0]), dtype=np.uint8)
    dist.broadcast(torch.from_numpy(message), src=0, group=_groups[0])
    return unpacked_arrays(message, int(sizes[1]))


def packed_arrays(arrays: Mapping[str, np.ndarray | None]) -> tuple[np.ndarray, int, int]:
    """Pack arrays into one message; return it, the length of its header and the array bytes."""
    given = {name: np.ascontiguousarray(values) for name, values in arrays.items() if values is not None}
    header = pickle.dumps([(name, values.dtype.str, values.shape) for name, values in given.items()])
    header += bytes(-len(header) % _ALIGNMENT)
    pieces = [np.frombuffer(header, dtype=np.uint8)]
    for values in given.values():
        pieces += [values.reshape(-1).view(np.uint8), np.zeros(-values.nbytes % _ALIGNMENT, np.uint8)]
    num_bytes = sum(values.nbytes for values in given.values())
    return np.concatenate(pieces), len(header), num_bytes


def unpacked_arrays(message: np.ndarray, header: int) -> dict[str, np.ndarray]:
    """Return the arrays of a message, as views of it."""
    arrays, start = {}, header
    for name, dtype, shape in pickle.loads(message[:header].tobytes()):
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays[name] = message[start : start + size].view(dtype).reshape(shape)
        start += size + -size % _ALIGNMENT
    return arrays
