"""Released memory no longer belongs to this process, and nothing else is lost."""

from __future__ import annotations

import threading

import psutil
import torch

from megarl.platform import memory

MIB = 2**20


def held() -> float:
    """MiB held by this process alone."""
    return float(psutil.Process().memory_full_info().uss) / MIB


def test_a_discarded_tensor_is_usable_and_its_neighbours_stay() -> None:
    neighbours = [torch.full((1000,), 7.0) for _ in range(2)]
    large = torch.full((64 * MIB // 4,), 3.0)
    small = torch.full((10,), 5.0)  # less than a page: there is nothing to give up
    before = held()
    assert 63 * MIB < memory.discard([large, large[10:], small]) <= 64 * MIB
    assert before - held() > 60
    assert set(large.unique().tolist()) <= {0.0, 3.0}  # what shares its first and last page stays
    assert (small == 5.0).all() and all((n == 7.0).all() for n in neighbours)
    large.fill_(2.0)
    assert (large == 2.0).all() and held() - before > -5


def test_freed_blocks_of_a_thread_leave_its_arena() -> None:
    kept: list[torch.Tensor] = []

    def build() -> None:
        torch.empty(24 * MIB // 4)  # freed: from now on malloc takes blocks up to this size from its arenas
        blocks = [torch.ones(MIB // 4) for _ in range(100)]
        kept.extend(blocks[::10])  # pins the arena, as a layer that stays would

    worker = threading.Thread(target=build)
    worker.start()
    worker.join()
    before = held()
    memory.trim_heap()
    assert before - held() > 60
    assert all((block == 1).all() for block in kept)
