"""Memory as it is measured, and that what is released no longer belongs to this process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
import transformers

from megarl.platform import memory
from tests.trainer import ranks
from tests.trainer.world import world

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


def test_resident_memory_is_what_psutil_says() -> None:
    block = torch.ones(64 * MIB // 4)
    assert abs(memory.resident_bytes() - psutil.Process().memory_info().rss) < 4 * MIB
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        deadline = time.monotonic() + 30
        while memory.resident_bytes(other.pid) < 2 * MIB:  # Python is loading
            assert time.monotonic() < deadline
        assert abs(memory.resident_bytes(other.pid) - psutil.Process(other.pid).memory_info().rss) < 4 * MIB
        other.communicate(b"\n")
    assert memory.resident_bytes(other.pid) == 0
    assert block.sum() > 0


def test_a_storage_counts_once_and_whole() -> None:
    whole, other = torch.zeros(100), torch.zeros(7, dtype=torch.bfloat16)
    freed = torch.zeros(50)
    freed.untyped_storage().resize_(0)
    assert memory.storage_bytes([whole[:3], whole[50:], other, freed], "cpu") == 400 + 14
    assert memory.storage_bytes([whole, other], "cpu", without=[whole[90:]]) == 14
    assert memory.storage_bytes([whole], "cuda") == 0


@pytest.mark.parametrize(
    ("backend", "dtype", "distributed"),
    [
        ("megatron", "float32", False),
        ("megatron", "float32", True),
        ("megatron", "bfloat16", True),
        ("torch", "float32", False),
    ],
)
def test_parts_of_a_trainer_are_its_state(
    model_dirs: dict[str, str], backend: str, dtype: str, distributed: bool
) -> None:
    """By the elements of transformers' model: weights, fp32 gradients, fp32 moments, masters of bfloat16."""
    model_dir = model_dirs["llama-biases"]
    count = transformers.AutoModelForCausalLM.from_pretrained(model_dir).num_parameters()
    [(untrained, found, asleep)] = world(1).run(ranks.memory_parts, model_dir, backend, dtype, distributed)
    item = 4 if dtype == "float32" else 2
    expected = {
        "parameters": item * count,
        "gradients": 4 * count,
        "optimizer": 8 * count + (0 if dtype == "float32" else 4 * count),
        "reference": item * count,
    }
    assert untrained["parameters"] == found["parameters"]
    assert found.keys() == expected.keys()
    for name, size in expected.items():
        assert size <= found[name] <= 1.03 * size, f"{name}, with the padding of buffers"
    assert asleep.get("gradients", 0) == (0 if backend == "megatron" else found["gradients"])
