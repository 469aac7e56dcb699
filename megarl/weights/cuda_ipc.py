"""Trainer memory on a GPU, mapped by an engine process on the same host (cudaIpcGetMemHandle).

A handle names a whole cudaMalloc block; torch adds the storage's offset in it. What it needs:

- blocks that cudaMalloc made: expandable segments and vLLM's sleep-mode pool are virtual-memory mappings,
  which these handles cannot name. The trainer's parameters are refused when the former are switched on;
  only the engine's own (copied) parameters ever lie in the latter;
- the mapping to be there before a CUDA graph records an address: engines attach before their first request
  and are re-attached as a whole when they restart;
- the same GPU, or one with peer access to it. A handle carries the GPU's UUID, since the two processes may
  number their devices differently (CUDA_VISIBLE_DEVICES).

The owner must keep the memory for as long as an engine has it mapped; the parameters live as long as the
trainer does, so that torch's counting of foreign users has nothing to decide.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from megarl.cluster.variables import expandable_segments
from megarl.errors import UserError
from megarl.weights.sync_plan import CudaStorage


def check_allocator() -> None:
    """Raise UserError where this environment gives torch memory on GPUs that has no handles."""
    if (name := expandable_segments(os.environ)) is not None:
        raise UserError(
            f"{name}: expandable_segments: no engine can map such memory; take it out (runs that train "
            "can set weights.transport=peer instead, and copy all weights at every step)"
        )


def share_storage(storage: Any, device_uuid: str) -> CudaStorage:
    """The handle of a storage on a GPU; raises UserError where its memory cannot have one."""
    check_allocator()
    _, *rest = storage._share_cuda_()
    return CudaStorage(device_uuid, tuple(rest), storage.nbytes())


def open_storage(shared: CudaStorage) -> Any:
    """Map it in this process, on the device of the same UUID."""
    index = device_index(shared.device_uuid)
    return torch.UntypedStorage._new_shared_cuda(index, *shared.ipc)


def device_index(device_uuid: str) -> int:
    """This process's number of the GPU; raises UserError when it cannot see it."""
    seen = [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())]
    if device_uuid not in seen:
        raise UserError(
            f"weights: the trainer's GPU {device_uuid} is not visible to the engine, which sees "
            f"{', '.join(seen) or 'none'}; both must be given it (CUDA_VISIBLE_DEVICES)"
        )
    return seen.index(device_uuid)
