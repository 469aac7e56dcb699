"""Giving memory back, where an allocator or an idle buffer would keep it: a host's, and a GPU's."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterable

import torch

_MADV_DONTNEED = 4


def trim_heap() -> None:
    """Have malloc give back what was freed (glibc's; others do so by themselves or not at all).

    Blocks below 32 MiB, such as the layers of a model that was built and then replaced, otherwise stay in
    malloc's arenas.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_unused() -> None:
    """Give back what this process has freed and its allocators keep, on the host and on its GPU."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Return when what this process has launched on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def discard(tensors: Iterable[torch.Tensor]) -> int:
    """Give up the memory behind CPU tensors whose values nobody needs; returns bytes.

    They stay valid, and read as zeros where a whole page lay in them. Linux, and not for shared memory.
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
