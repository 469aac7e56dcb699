"""An engine rank's memory: its own parameters and caches, each storage once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import torch

from megarl.inference.interface import EngineMemory
from megarl.inference.memory_use import engine_memory
from megarl.inference.weight_receiver import AttachedWeights

CPU = torch.device("cpu")


def test_what_the_trainer_owns_is_not_the_engines() -> None:
    pool = torch.zeros(1000)  # the trainer's: two aliased parameters, and a view that no plan names
    params = {"a": pool[:100], "b": pool[100:300], "tied": pool[:100], "own": torch.zeros(70)}
    attached: Any = AttachedWeights.__new__(AttachedWeights)
    attached.aliases = [SimpleNamespace(param="a"), SimpleNamespace(param="b")]
    pages = torch.zeros(512)
    caches = [(pages[:256], pages[256:]), {"state": [torch.zeros(3, dtype=torch.float64)]}]
    found = engine_memory(params, attached, caches, CPU)
    assert (found.parameters, found.kv_cache, found.allocated) == (4 * 70, 4 * 512 + 24, 0)
    assert abs(found.resident - psutil.Process().memory_info().rss) < 4 * 2**20
    assert engine_memory(params, None, [], CPU).parameters == 4 * 1070, (
        "before it is attached all are its own"
    )


def test_ranks_add_up() -> None:
    assert EngineMemory(1, 2, 3, 4) + EngineMemory(10, 20, 30, 40) == EngineMemory(11, 22, 33, 44)
