"""Control between ranks: Python values that go around, barriers, and tensors on their way to disk.

All of it runs over gloo, in a group of its own, on every platform; NCCL carries the tensors of a step and
nothing else. A collective of NCCL that waits is a kernel that spins on a GPU, and while the other ranks wait
for rank 0's rollout the engine needs that GPU. It also gives up after its group's timeout, though a rollout
may take any time. Here a wait has no limit: the heartbeat finds ranks that are gone or stuck.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

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
