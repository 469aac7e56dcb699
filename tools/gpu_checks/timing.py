"""Time work on the device, and measure the two ceilings for comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def device_seconds(call: Callable[[], Any], repeats: int = 10, warmup: int = 3, calls: int = 1) -> float:
    """Return the median device time of ``call``, measured by two events around ``calls`` calls."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def graph_seconds(call: Callable[[], Any], calls: int = 20) -> float | None:
    """Like device_seconds, without the host: ``calls`` captured in a CUDA graph. None if capture fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except Exception as error:
        print("not capturable:", error, flush=True)
        torch.cuda.synchronize()
        return None
    return device_seconds(graph.replay) / calls


def copy_bandwidth(quick: bool) -> float:
    """Return bytes per second of a copy on the device, reads plus writes."""
    source = torch.randn(2**20 if quick else 2**29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source))


def gemm_rate(quick: bool) -> float:
    """Return FLOP per second of a large bf16 matrix product of random numbers."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / device_seconds(lambda: a @ b)
