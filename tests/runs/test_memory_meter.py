"""Memory of a step as metrics: the parts, the rest of the peak, and the processes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megarl import platform
from megarl.algorithms.critic import ActorCritic
from megarl.runs.memory_meter import MemoryMeter, as_metrics

GIB = 2**30
MIB = 2**20


def trainer(**parts: int) -> Any:
    return SimpleNamespace(memory_bytes=lambda: dict(parts))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "current", lambda: SimpleNamespace(name="cuda"))
    monkeypatch.setattr(platform, "peak_memory_gib", lambda: 10.0)
    monkeypatch.setattr(platform, "allocated_bytes", lambda: (6 * GIB, 11 * GIB))


@pytest.mark.usefixtures("on_gpu")
def test_on_a_gpu_the_parts_add_up_to_the_peak() -> None:
    meter = MemoryMeter()
    meter.measure(trainer(parameters=2 * GIB, optimizer=4 * GIB))
    found = as_metrics(meter.read())
    resident = found.pop("memory_resident_gib")
    assert found == {
        "memory_parameters_gib": 2.0,
        "memory_optimizer_gib": 4.0,
        "memory_activations_gib": 4.0,
        "memory_allocated_gib": 6.0,
        "memory_reserved_gib": 11.0,
    }
    assert abs(resident * GIB - psutil.Process().memory_info().rss) < 4 * MIB


def test_on_a_cpu_libraries_are_in_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "current", lambda: SimpleNamespace(name="cpu"))
    meter = MemoryMeter()
    meter.watch("environments", lambda: [os.getpid(), os.getppid()])
    meter.measure(trainer(parameters=MIB))
    found = meter.read()
    assert found.keys() == {"parameters", "other", "resident", "environments_resident"}
    assert found["other"] + MIB == pytest.approx(platform.peak_memory_gib() * GIB, abs=4 * MIB)
    both = sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), os.getppid()))
    assert abs(found["environments_resident"] - both) < 8 * MIB


def test_a_critic_is_one_part() -> None:
    pair = ActorCritic(trainer(parameters=3, optimizer=5), trainer(parameters=7, gradients=11))
    assert pair.memory_bytes() == {"parameters": 3, "optimizer": 5, "critic": 18}
