"""Move the trainer's parameters into memory an engine can map, and map it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from megarl.errors import UserError
from megarl.models.table import Region
from megarl.weights import cuda_ipc
from megarl.weights.memory_domain import device_id, host_id
from megarl.weights.plan import Owner
from megarl.weights.sync_plan import CudaStorage, SharedStorage, SourceView, Storage


def pool_parameters(
    params: Mapping[str, torch.Tensor], reserved: Mapping[str, int] | None = None
) -> dict[torch.dtype, torch.Tensor]:
    """Move all parameters into one flat buffer per dtype, so there are few handles to share.

    Values do not change; each parameter becomes a view, aligned to 64 bytes. Must run before an optimizer or
    a gradient buffer references the parameters. Parameters must not share storage (tied ones are one
    Parameter). ``reserved`` are numbers of elements that some take up, the rest of which stays zero (an
    engine's vocabulary padding).
    """
    reserved = reserved or {}
    align = 64
    buffers = {}
    for dtype in dict.fromkeys(param.dtype for param in params.values()):
        names = [name for name, param in params.items() if param.dtype == dtype]
        members = [params[name] for name in names]
        offsets = [0]
        for name, param in zip(names, members, strict=True):
            count = max(param.numel(), reserved.get(name, 0))
            offsets.append(offsets[-1] + -(-count * dtype.itemsize // align) * align // dtype.itemsize)
        buffer = torch.zeros(offsets[-1], dtype=dtype, device=members[0].device)
        with torch.no_grad():
            for param, start in zip(members, offsets[:-1], strict=True):
                view = buffer[start : start + param.numel()].view(param.shape)
                view.copy_(param)
                param.data = view
        buffers[dtype] = buffer
    return buffers


def share_parameters(
    params: Mapping[str, torch.Tensor], regions: list[Region], *, mapped: bool = True
) -> Owner:
    """Make the parameters' storages mappable (in place: all views stay valid) and describe them.

    On a CPU they move into shared memory; on a GPU they stay, and without ``mapped`` they get no handles:
    engines then request their pieces from this rank.
    """
    storages: list[Storage] = []
    numbers: dict[int, int] = {}
    views = {}
    for name, param in params.items():
        storage = param.untyped_storage()
        if param.device.type == "cpu" and not storage.is_shared():
            _move_to_shared_memory(storage)  # the address below is the new one
        key = storage.data_ptr()
        if key not in numbers:
            numbers[key] = len(storages)
            storages.append(_shared_handle(storage, param.device, mapped))
        views[name] = SourceView(
            numbers[key],
            str(param.dtype).removeprefix("torch."),
            int(param.storage_offset()),
            tuple(param.shape),
            tuple(param.stride()),
        )
    device = next(iter(params.values())).device
    return Owner(regions, views, storages, host=host_id(), device=device_id(device))


def _move_to_shared_memory(storage: torch.UntypedStorage) -> None:
    try:
        storage._share_filename_cpu_()
    except RuntimeError as error:
        if "torch_shm_manager" not in str(error):
            raise
        # The command line chooses another directory (megarl.cluster.limits); this is for other callers.
        raise UserError(
            f"TMPDIR: torch's manager of shared memory cannot use {os.environ.get('TMPDIR', '/tmp')!r}, "
            "whose path is missing or too long for a socket: choose another directory"
        ) from error


def storages_of(params: Mapping[str, torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return the parameters' storages, in :func:`share_parameters`'s order."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in params.values()}
    return list(found.values())


def open_storage(shared: Storage) -> torch.UntypedStorage:
    """Map a block of the trainer's memory in this process."""
    if isinstance(shared, CudaStorage):
        storage: torch.UntypedStorage = cuda_ipc.open_storage(shared)
        return storage
    return torch.UntypedStorage._new_shared_filename_cpu(*shared.handle)


def _shared_handle(storage: torch.UntypedStorage, device: torch.device, mapped: bool) -> Storage:
    if device.type == "cpu":
        return SharedStorage(tuple(storage._share_filename_cpu_()))
    if not mapped:
        return CudaStorage(device_id(device), (), storage.nbytes())
    return cuda_ipc.share_storage(storage, device_id(device))
