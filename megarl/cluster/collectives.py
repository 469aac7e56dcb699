"""Control between ranks: Python values that go around, barriers, and tensors on their way to disk.

All of it runs over gloo, in a group of its own, on every platform; NCCL carries the tensors of a step and
nothing else. A collective of NCCL that waits is a kernel that spins on a GPU, and while the other ranks wait
for rank 0's rollout the engine needs that GPU. It also gives up after its group's timeout, though a rollout
may take any time. Here a wait has no limit: the heartbeat finds ranks that are gone or stuck.
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

Result = TypeVar("Result")

_NO_LIMIT = timedelta(days=365)
_groups: list[dist.ProcessGroup] = []  # one between join() and leave()


def join() -> None:
    """Make the group; every rank calls it, when the default process group is there."""
    assert not _groups, "the control group is there already"
    if dist.get_world_size() > 1:
        _groups.append(dist.new_group(backend="gloo", timeout=_NO_LIMIT))


def leave() -> None:
    """Forget the group; it ends with the default one."""
    _groups.clear()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank (picklable)."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_groups[0])
    return values


def gather_to_first_rank(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on rank 0 (picklable); an empty list elsewhere."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_groups[0])
    return values or []


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank (picklable; other ranks pass anything)."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_groups[0])
    return box[0]


def from_first_rank(make: Callable[[], Result]) -> Result:
    """What ``make`` returns on rank 0, on every rank (picklable); the others do not call it.

    Raises:
        UserError: ``make`` did. Every rank ends with it, instead of waiting for a rank that is gone.
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
    """What ``make`` returns, on rank 0 alone, which alone calls it; None elsewhere.

    Raises:
        UserError: ``make`` did, as in :func:`from_first_rank`.
    """
    kept: list[Result] = []
    from_first_rank(lambda: kept.append(make()))
    return kept[0] if kept else None


def barrier() -> None:
    """Return when every rank has called it. A broadcast's source need not wait for the others."""
    gather(None)


def wait_for_devices() -> None:
    """Return when all that every rank has launched on its device is done.

    Between ranks alone the order of their streams would do. An engine is another process: it sees device
    memory as it is, and reads that of every rank.
    """
    platform.synchronize()
    barrier()


def send_to_first_rank(tensor: torch.Tensor) -> None:
    """Give a tensor in host memory to rank 0, which calls :func:`receive` for it; not called by rank 0."""
    dist.send(tensor.contiguous(), dst=0, group=_groups[0])


def receive(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On rank 0: the next tensor that ``rank`` sends, of this shape and type, in host memory."""
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(tensor, src=rank, group=_groups[0])
    return tensor


# --- arrays: raw bytes, of which only names, types and shapes are pickled ---------------------------------

_ALIGNMENT = 8  # bytes: no array begins at an odd place


def send_arrays(arrays: Mapping[str, np.ndarray | None], to: int) -> int:
    """Send named arrays (None: absent) to rank ``to``, which calls :func:`receive_arrays`; returns the bytes.

    Two messages: the sizes, and everything else in one buffer.
    """
    message, header, num_bytes = packed_arrays(arrays)
    dist.send(torch.tensor([len(message), header]), dst=to, group=_groups[0])
    dist.send(torch.from_numpy(message), dst=to, group=_groups[0])
    return num_bytes


def receive_arrays(source: int) -> dict[str, np.ndarray]:
    """The next arrays that rank ``source`` sends to this one; views of one buffer."""
    sizes = torch.empty(2, dtype=torch.int64)
    dist.recv(sizes, src=source, group=_groups[0])
    length, header = sizes.tolist()
    message = torch.empty(length, dtype=torch.uint8)
    dist.recv(message, src=source, group=_groups[0])
    return unpacked_arrays(message.numpy(), header)


def broadcast_arrays(arrays: Mapping[str, np.ndarray | None] | None) -> dict[str, np.ndarray]:
    """Rank 0's named arrays on every rank (other ranks pass anything)."""
    if dist.get_world_size() == 1:
        assert arrays is not None
        return {name: values for name, values in arrays.items() if values is not None}
    message, sizes = np.zeros(0, np.uint8), torch.zeros(2, dtype=torch.int64)
    if dist.get_rank() == 0:
        message, header, _ = packed_arrays(arrays or {})
        sizes = torch.tensor([len(message), header])
    dist.broadcast(sizes, src=0, group=_groups[0])
    message = message if dist.get_rank() == 0 else np.empty(int(sizes[0]), dtype=np.uint8)
    dist.broadcast(torch.from_numpy(message), src=0, group=_groups[0])
    return unpacked_arrays(message, int(sizes[1]))


def packed_arrays(arrays: Mapping[str, np.ndarray | None]) -> tuple[np.ndarray, int, int]:
    """One message of bytes, how many of them are its header, and how many the arrays themselves have."""
    given = {name: np.ascontiguousarray(values) for name, values in arrays.items() if values is not None}
    header = pickle.dumps([(name, values.dtype.str, values.shape) for name, values in given.items()])
    header += bytes(-len(header) % _ALIGNMENT)
    pieces = [np.frombuffer(header, dtype=np.uint8)]
    for values in given.values():
        pieces += [values.reshape(-1).view(np.uint8), np.zeros(-values.nbytes % _ALIGNMENT, np.uint8)]
    num_bytes = sum(values.nbytes for values in given.values())
    return np.concatenate(pieces), len(header), num_bytes


def unpacked_arrays(message: np.ndarray, header: int) -> dict[str, np.ndarray]:
    """The arrays of a message, as views of it."""
    arrays, start = {}, header
    for name, dtype, shape in pickle.loads(message[:header].tobytes()):
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays[name] = message[start : start + size].view(dtype).reshape(shape)
        start += size + -size % _ALIGNMENT
    return arrays
