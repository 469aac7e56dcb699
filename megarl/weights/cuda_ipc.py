"""Trainer memory on a GPU, mapped by an engine process on the same host (cudaIpcGetMemHandle).

A handle names a whole cudaMalloc block; torch adds the storage's offset in it. Requirements:

- blocks made by cudaMalloc: expandable segments and vLLM's sleep-mode pool are virtual-memory mappings, which
  these handles cannot name. With the former switched on, the trainer's parameters cannot be shared; the
  latter holds only the engine's own (copied) parameters;
- the mapping exists before a CUDA graph records an address: engines attach before their first request and are
  re-attached as a whole when they restart;
- the same GPU, or one with peer access to it. A handle carries the GPU's UUID, since the two processes may
  number their devices differently (CUDA_VISIBLE_DEVICES).

The owner must keep the memory while an engine has it mapped. The parameters live as long as the trainer, so
torch's count of foreign users does not matter.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from megarl.cluster.variables import expandable_segments
from megarl.errors import UserError
from megarl.weights.sync_plan import CudaStorage


def check_allocator() -> None:
    """Raise UserError if this environment gives torch GPU memory that has no handles."""
    if (name := expandable_segments(os.environ)) is not None:
        raise UserError(
            f"{name}: expandable_segments: no engine can map such memory; remove it (training runs "
            "can set weights.transport=peer instead, and copy all weights at every step)"
        )


def share_storage(storage: Any, device_uuid: str) -> CudaStorage:
    """Return the handle of a storage on a GPU; UserError if its memory cannot have one."""
    check_allocator()
    _, *rest = storage._share_cuda_()
    return CudaStorage(device_uuid, tuple(rest), storage.nbytes())


def open_storage(shared: CudaStorage) -> Any:
    """Map the storage in this process, on the device of the same UUID."""
    index = device_index(shared.device_uuid)
    return torch.UntypedStorage._new_shared_cuda(index, *shared.ipc)


def device_index(device_uuid: str) -> int:
    """Return this process's index of the GPU; UserError if it is not visible."""
    seen = [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())]
    if device_uuid not in seen:
        raise UserError(
            f"weights: the trainer's GPU {device_uuid} is not visible to the engine, which sees "
            f"{', '.join(seen) or 'none'}; both need it (CUDA_VISIBLE_DEVICES)"
        )
    return seen.index(device_uuid)
