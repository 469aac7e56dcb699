"""Handles of GPU memory: what can be tested without a GPU, and the rest with one."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.errors import UserError
from megarl.weights import cuda_ipc
from megarl.weights.shared_storage import _shared_handle, open_storage, share_parameters
from megarl.weights.sync_plan import CudaStorage

UUIDS = ["GPU-a", "GPU-b", "GPU-c"]


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=UUIDS[n]), raising=False
    )


class Storage:
    """Answers as torch's storage on GPU 2 does."""

    def _share_cuda_(self) -> tuple[Any, ...]:
        return (2, b"handle", 4096, 512, b"counter", 8, b"event", True)

    def nbytes(self) -> int:
        return 3584


def test_the_device_number_is_the_readers_own(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(
        torch.UntypedStorage, "_new_shared_cuda", lambda *args: opened.append(args), raising=False
    )
    shared = cuda_ipc.share_storage(Storage(), "GPU-b")
    assert shared == CudaStorage("GPU-b", (b"handle", 4096, 512, b"counter", 8, b"event", True), 3584)
    open_storage(shared)
    assert opened == [(1, b"handle", 4096, 512, b"counter", 8, b"event", True)], "GPU-b is number 1 here"


def test_a_gpu_the_engine_cannot_see_is_named(three_gpus: None) -> None:
    with pytest.raises(UserError, match="GPU-x is not visible to the engine, which sees GPU-a, GPU-b, GPU-c"):
        cuda_ipc.open_storage(CudaStorage("GPU-x", (), 0))


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_virtual_memory_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments: True")
    with pytest.raises(UserError, match=f"{name}: expandable_segments"):
        cuda_ipc.share_storage(Storage(), "GPU-a")


def test_what_is_asked_for_point_to_point_needs_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that weights.transport=peer does where memory has none."""
    monkeypatch.setattr("megarl.weights.shared_storage.device_id", lambda device: UUIDS[device.index])
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    storage: Any = Storage()
    assert _shared_handle(storage, torch.device("cuda", 1), mapped=False) == CudaStorage("GPU-b", (), 3584)
    with pytest.raises(UserError):
        _shared_handle(storage, torch.device("cuda", 1), mapped=True)


def _add_one(shared: CudaStorage, done: Any) -> None:
    storage = open_storage(shared)
    tensor = torch.empty(0, device=storage.device).set_(storage, 0, (64,), (1,))
    tensor.add_(1.0)
    torch.cuda.synchronize()
    done.set()


@pytest.mark.gpu
def test_another_process_writes_into_the_trainers_memory() -> None:
    weight = torch.arange(64.0, device="cuda")
    [shared] = share_parameters({"weight": weight}, []).storages
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    process = context.Process(target=_add_one, args=(shared, done))
    process.start()
    assert done.wait(60)
    process.join()
    assert torch.equal(weight.cpu(), torch.arange(64.0) + 1)
