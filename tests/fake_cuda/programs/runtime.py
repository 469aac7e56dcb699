"""Cases of test_runtime.py: memory, launches, graphs and loaded libraries."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from case import case, main

LIB = Path(os.environ["FAKECUDA_LIB"])
MIB = 1 << 20


def runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIB / "libcudart.so.13"))


def free_mib() -> int:
    return torch.cuda.mem_get_info()[0] // MIB


@case
def out_of_memory() -> Any:
    """A GPU of 256 MiB: what fits, what does not, and what is free afterwards."""
    before = free_mib()
    held = torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
    during = free_mib()
    try:
        torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
        refused = ""
    except torch.cuda.OutOfMemoryError as error:
        refused = str(error)
    other = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda:1").numel() // MIB
    del held
    torch.cuda.empty_cache()
    return {"before": before, "during": during, "refused": refused, "other": other, "after": free_mib()}


@case
def allocator() -> Any:
    """Tensors of many sizes, some freed early, hold what was written; all memory is free in the end."""
    torch.cuda.init()
    before = free_mib()
    random = torch.Generator().manual_seed(3)
    held: dict[int, torch.Tensor] = {}
    wrong = 0
    for step in range(200):
        size = int(torch.randint(1, 1 << 20, (1,), generator=random))
        held[step] = torch.full((size,), float(step), device="cuda")
        if step % 3 == 2:
            old = min(held)
            tensor = held.pop(old)
            wrong += int(not (tensor == float(old)).all().item())
    used = before - free_mib()
    wrong += sum(int(not (tensor == float(step)).all().item()) for step, tensor in held.items())
    needed = sum(tensor.numel() * 4 for tensor in held.values()) // MIB
    held.clear()
    del tensor
    torch.cuda.empty_cache()
    return {"wrong": wrong, "enough": used >= needed, "left": before - free_mib()}


@case
def hold_memory(directory: str) -> int:
    """Hold 200 MiB until released; report when they are allocated."""
    held = torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
    (Path(directory) / "held").touch()
    while not (Path(directory) / "enough").exists():
        time.sleep(0.01)
    return held.numel() // MIB


@case
def want_memory(directory: str) -> Any:
    """Request 100 MiB while they are held, and again after the holder was killed."""
    while not (Path(directory) / "held").exists():
        time.sleep(0.01)
    beside = free_mib()
    try:
        torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
        refused = False
    except torch.cuda.OutOfMemoryError:
        refused = True
    (Path(directory) / "tried").touch()
    while not (Path(directory) / "killed").exists():
        time.sleep(0.01)
    torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
    return [beside, refused]


@case
def virtual_memory() -> Any:
    """The driver's virtual memory is charged until released and unmapped; what is mapped again is new."""
    torch.cuda.init()
    driver = ctypes.CDLL(str(LIB / "libcuda.so.1"))
    size = 64 * MIB
    address, handle = ctypes.c_ulonglong(), ctypes.c_ulonglong()

    class Properties(ctypes.Structure):
        _fields_ = (
            ("type", ctypes.c_int),
            ("handles", ctypes.c_int),
            ("location_type", ctypes.c_int),
            ("location", ctypes.c_int),
            ("rest", ctypes.c_char * 64),
        )

    device = Properties(type=1, location_type=1, location=0)
    free = [free_mib()]

    def check(code: int) -> None:
        assert code == 0, code

    def create_and_map() -> None:
        check(driver.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(device), 0))
        check(driver.cuMemMap(address, ctypes.c_size_t(size), ctypes.c_size_t(0), handle, 0))

    check(driver.cuMemAddressReserve(ctypes.byref(address), ctypes.c_size_t(size), 0, 0, 0))
    create_and_map()
    ctypes.memset(address.value, 7, 16)
    first = ctypes.string_at(address.value, 2)
    check(driver.cuMemRelease(handle))  # still mapped, hence still in use
    free.append(free_mib())
    check(driver.cuMemUnmap(address, ctypes.c_size_t(size)))
    free.append(free_mib())
    create_and_map()
    second = ctypes.string_at(address.value, 2)
    code = driver.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(1 << 40), ctypes.byref(device), 0)
    return {"free": [f - free[0] for f in free], "bytes": [first.hex(), second.hex()], "too_much": code}


@case
def launches() -> Any:
    """Codes of launches at and past the limits, of a kernel that stands inside an operator."""
    cuda = runtime()
    kernel = ctypes.create_string_buffer(1)
    cuda.__cudaRegisterFunction(None, kernel, None, b"_Z6orphanPf", -1, None, None, None, None, None)

    class Dim(ctypes.Structure):
        _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def launch(grid: tuple[int, int, int], block: tuple[int, int, int], shared: int = 0) -> int:
        code = cuda.cudaLaunchKernel(kernel, Dim(*grid), Dim(*block), None, ctypes.c_size_t(shared), None)
        return int(code)

    cuda.fakecuda_begin_op(b"test")
    one = (1, 1, 1)
    codes = {
        "good": launch((2**31 - 1, 65535, 65535), (1024, 1, 1)),
        "block": launch(one, (1025, 1, 1)),
        "depth": launch(one, (1, 1, 65)),
        "volume": launch(one, (32, 33, 1)),
        "empty": launch((0, 1, 1), one),
        "grid": launch((1, 65536, 1), one),
        "shared": launch(one, one, 49153),
    }
    cuda.cudaFuncSetAttribute(kernel, 8, 100_000)  # cudaFuncAttributeMaxDynamicSharedMemorySize
    codes["allowed"] = launch(one, one, 100_000)
    codes["beyond"] = cuda.cudaFuncSetAttribute(kernel, 8, 233_000)
    cuda.fakecuda_end_op()
    cuda.cudaGetLastError()
    return codes


@case
def orphan(how: str) -> int:
    """Launch a kernel without an implementation."""
    torch.cuda.init()
    code = launches_one(b"_Z6orphanPf")
    sys.stdout.flush()
    if how == "killed":  # as a Ray worker ends: without exit handlers
        os._exit(0)
    return code


def launches_one(name: bytes) -> int:
    cuda = runtime()
    kernel = ctypes.create_string_buffer(1)
    cuda.__cudaRegisterFunction(None, kernel, None, name, -1, None, None, None, None, None)
    dims = (ctypes.c_uint * 3)(1, 1, 1)

    class Dim(ctypes.Structure):
        _fields_ = (("v", ctypes.c_uint * 3),)

    return int(cuda.cudaLaunchKernel(kernel, Dim(dims), Dim(dims), None, ctypes.c_size_t(0), None))


@case
def graph() -> Any:
    """A capture computes nothing; a replay reads what its inputs hold then, on a stream drawn in too."""
    x, total = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    side = torch.cuda.Stream()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        total.add_(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = total * 2
        torch.cuda.current_stream().wait_stream(side)
        result = doubled + 1
    after_capture = total.tolist()
    results = []
    for value in (5.0, 7.0):
        x.fill_(value)
        captured.replay()
        results.append(result[0].item())
    outside = torch.cuda.Event()
    outside.record()
    refused = ""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            stream.wait_event(outside)
    except Exception as error:
        refused = str(error)
    return {"after_capture": after_capture, "results": results, "refused": refused}


@case
def profiler() -> Any:
    """The profiler of torch runs on the fake CUPTI, and knows the CPU's events."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.ones(4, device="cuda").add_(1)
    return [event.key for event in profile.key_averages() if event.key == "aten::add_"]


@case
def loaded_libraries(python_package: str) -> Any:
    """What is mapped after another package has loaded the runtime by its path; the device it sees."""
    if python_package == "ctypes":
        from importlib.metadata import files

        real = next(f for f in files("nvidia-cuda-runtime") or [] if f.name == "libcudart.so.13")
        count = ctypes.c_int()
        ctypes.CDLL(str(real.locate())).cudaGetDeviceCount(ctypes.byref(count))
        seen = count.value
    else:
        from cuda.bindings import driver

        driver.cuInit(0)
        seen = driver.cuDeviceGetCount()[1]
    mapped = set(
        re.findall(r"\S*/lib(?:cudart|cuda|nccl|cupti|nvidia-ml)\.so\S*", Path("/proc/self/maps").read_text())
    )
    return {"devices": seen, "real": sorted(path for path in mapped if not path.startswith(str(LIB)))}


@case
def shared_tensor_owner(directory: str) -> float:
    """Lends a tensor to another process by cudaIpc, then writes to it: with `ordered`, synchronised."""
    from torch.multiprocessing.reductions import reduce_tensor

    ordered = os.environ["ORDERED"] == "1"
    folder = Path(directory)
    x = torch.full((1000,), 1.0, device="cuda")
    torch.cuda.synchronize()
    torch.save(reduce_tensor(x)[1], folder / "handle.part")
    os.replace(folder / "handle.part", folder / "handle")
    while not (folder / "opened").exists():
        time.sleep(0.01)
    x.mul_(3)
    if ordered:
        torch.cuda.synchronize()
    (folder / "written").touch()
    while not (folder / "read").exists():
        time.sleep(0.01)
    return x[0].item()


@case
def shared_tensor_borrower(directory: str) -> float:
    """Reads what the owner has written, as an engine reads the trainer's weights."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    folder = Path(directory)
    while not (folder / "handle").exists():
        time.sleep(0.01)
    x = rebuild_cuda_tensor(*torch.load(folder / "handle", weights_only=False))
    (folder / "opened").touch()
    while not (folder / "written").exists():
        time.sleep(0.01)
    value = x.sum().item() / len(x)
    (folder / "read").touch()
    return value


if __name__ == "__main__":
    main()
