"""The fake runtime and driver: memory over processes, launches, graphs, and which libraries are loaded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fake_cuda.conftest import FakeGpu, describe

PROGRAM = "programs/runtime.py"
QUARTER = 0.25  # GiB


def test_memory_has_a_limit(fake_gpu: FakeGpu) -> None:
    (result,) = fake_gpu.run(PROGRAM, "out_of_memory", memory_gb=QUARTER)
    assert result["before"] == result["after"] == 256
    assert result["during"] == 56
    assert "Tried to allocate 100.00 MiB" in result["refused"]
    assert result["other"] == 100  # another device has its own


@pytest.mark.parametrize("backend", ["backend:native", "expandable_segments:True", "backend:cudaMallocAsync"])
def test_allocators_of_torch(fake_gpu: FakeGpu, backend: str) -> None:
    """Of blocks, of virtual memory, and of the runtime's memory pools."""
    (result,) = fake_gpu.run(
        PROGRAM, "allocator", PYTORCH_CUDA_ALLOC_CONF=backend, PYTORCH_ALLOC_CONF=backend
    )
    assert result == {"wrong": 0, "enough": True, "left": 0}


def test_processes_share_a_device_and_a_killed_one_gives_its_memory_back(
    fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    holder = fake_gpu.start(PROGRAM, "hold_memory", str(tmp_path), memory_gb=QUARTER)
    other = fake_gpu.start(PROGRAM, "want_memory", str(tmp_path), memory_gb=QUARTER)
    while not (tmp_path / "tried").exists() and other.poll() is None:
        time.sleep(0.01)
    holder.kill()
    holder.wait()
    (tmp_path / "killed").touch()
    assert [process.code for process in fake_gpu.finish([holder])] == [-9]
    (finished,) = fake_gpu.finish([other])
    assert finished.code == 0, finished.errors
    assert finished.result == [[56, True]]


def test_virtual_memory(fake_gpu: FakeGpu) -> None:
    (result,) = fake_gpu.run(PROGRAM, "virtual_memory")
    assert result == {"free": [0, -64, 0], "bytes": ["0707", "0000"], "too_much": 2}


def test_launch_limits(fake_gpu: FakeGpu) -> None:
    (codes,) = fake_gpu.run(PROGRAM, "launches")
    invalid_value, invalid_configuration = 1, 9
    assert {name: code for name, code in codes.items() if code == 0} == {"good": 0, "allowed": 0}
    assert {name for name, code in codes.items() if code == invalid_value} == {"shared", "beyond"}
    wrong_shape = {"block", "depth", "volume", "empty", "grid"}
    assert {name for name, code in codes.items() if code == invalid_configuration} == wrong_shape


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_skipped_kernel_fails_the_run(fake_gpu: FakeGpu, how: str) -> None:
    (finished,) = fake_gpu.finish([fake_gpu.start(PROGRAM, "orphan", how)])
    assert fake_gpu.session.skipped() == {"orphan(float*)"}
    assert finished.code == (86 if how == "ends" else 0)
    assert ("1 x orphan(float*)" in finished.errors) == (how == "ends")


@pytest.mark.parametrize("lazy", [False, True])
def test_graph(fake_gpu: FakeGpu, lazy: bool) -> None:
    (result,) = fake_gpu.run(PROGRAM, "graph", lazy=lazy)
    assert result["after_capture"] == [0, 0, 0, 0]
    assert result["results"] == [11, 25]
    assert "uncaptured work" in result["refused"]


def test_profiler(fake_gpu: FakeGpu) -> None:
    assert fake_gpu.run(PROGRAM, "profiler") == [["aten::add_"]]


def test_libraries_loaded_by_their_path_are_the_fake_ones(fake_gpu: FakeGpu) -> None:
    (results,) = fake_gpu.run(PROGRAM, "loaded_libraries", "ctypes", "cuda.bindings", devices=3)
    assert results == [{"devices": 3, "real": []}] * 2


@pytest.mark.parametrize(("lazy", "ordered", "seen"), [(False, False, 3), (True, True, 3), (True, False, 1)])
def test_tensor_shared_between_processes(
    fake_gpu: FakeGpu, tmp_path: Path, lazy: bool, ordered: bool, seen: float
) -> None:
    """A write that is launched but not synchronised is not there yet for the process it was announced to."""
    setting = {"lazy": lazy, "ORDERED": int(ordered)}
    owner, borrower = (
        fake_gpu.start(PROGRAM, f"shared_tensor_{role}", str(tmp_path), **setting)
        for role in ("owner", "borrower")
    )
    ended = fake_gpu.finish([owner, borrower])
    assert [process.code for process in ended] == [0, 0], describe(ended)
    assert [process.result for process in ended] == [[3], [seen]]
