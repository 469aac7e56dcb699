"""Memory of processes and tensors: measure it, and return what is unused to the host and the GPU."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterable

import torch

_MADV_DONTNEED = 4


def trim_heap() -> None:
    """Make malloc return freed memory (glibc's only; others do so themselves or not at all).

    Blocks below 32 MiB, such as the layers of a model that was built and then replaced, otherwise stay in
    malloc's arenas.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_unused() -> None:
    """Return memory that this process has freed but its allocators keep, on the host and on its GPU."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait for all work that this process has launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def storage_bytes(
    tensors: Iterable[torch.Tensor], device_type: str, without: Iterable[torch.Tensor] = ()
) -> int:
    """Return the bytes of the storages under ``tensors``, each once, on devices of a type.

    A storage is counted whole, with its padding; those under ``without`` are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type == device_type and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident memory of a process of this host (None: this one), shared pages included.

    0 if it has ended. Linux only.
    """
    try:
        with open(f"/proc/{'self' if pid is None else pid}/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def discard(tensors: Iterable[torch.Tensor]) -> int:
    """Release the memory of CPU tensors whose values are no longer needed; return bytes.

    They stay valid, and read as zeros where they cover a whole page. Linux only, and not for shared memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    page, total = mmap.PAGESIZE, 0
    for address, storage in storages.items():
        assert storage.device.type == "cpu"
        start = -(-address // page) * page
        length = (address + storage.nbytes()) // page * page - start
        if length > 0:
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")
            total += length
    return total
