"""Measure how much a waiting kernel slows working ones: the minimum cost of NCCL collectives to an engine.

A rank that waits in an NCCL collective keeps a kernel spinning. Here one spins on a separate stream, first in
the computing process, then in another one; the GPU time-slices between them as between trainer and engine.
The work is a chain of small matrix products, as in decoding.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

from gpu_checks.report import Report

SPIN_SECONDS = 4.0
CLOCK = 2.0e9  # at least as fast as the SMs' clock, so it spins for at least as long


def run(report: Report) -> None:
    """Time the chain alone, next to a spinning kernel, and next to one of another process."""
    chain = Chain(report.quick)
    alone = chain.milliseconds()
    report.figure("alone_ms", alone)
    stream = torch.cuda.Stream()
    seconds = 0.1 if report.quick else SPIN_SECONDS
    with torch.cuda.stream(stream):
        _spin(seconds)
    same = chain.milliseconds()
    still = not stream.query()
    stream.synchronize()
    report.figure("beside_spinning_stream_ms", same)
    report.figure("spun_throughout", still)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_spinner, args=(theirs, seconds), daemon=True)
    process.start()
    if not pipe.poll(30) or pipe.recv() != "ready":
        raise TimeoutError("the second process does not start")
    idle = chain.milliseconds()
    report.figure("beside_idle_process_ms", idle)
    pipe.send("spin")
    pipe.recv()
    time.sleep(0.05)
    other = chain.milliseconds()
    report.figure("beside_spinning_process_ms", other)
    report.figure("other_spun_throughout", not pipe.poll())
    process.kill()
    process.join()
    report.figure("slowdown", {"stream": same / alone, "process": other / idle})
    report.summary(f"a waiting kernel makes another process {other / idle:.2f} times as slow")


def _spin(seconds: float) -> None:
    """Start a kernel that spins for this long."""
    torch.cuda._sleep(int(seconds * CLOCK))


def _spinner(pipe: Connection, seconds: float) -> None:
    torch.zeros(1, device="cuda")
    _spin(0.001)
    torch.cuda.synchronize()
    pipe.send("ready")
    pipe.recv()
    _spin(seconds)
    pipe.send("spinning")
    torch.cuda.synchronize()
    pipe.send("spun")
    time.sleep(60)


class Chain:
    """Forty products of 64 rows with square matrices, one after the other, and a sync."""

    def __init__(self, quick: bool) -> None:
        size = 64 if quick else 4096
        self.rows = torch.randn(64, size, device="cuda", dtype=torch.bfloat16)
        self.weights = [
            torch.randn(size, size, device="cuda", dtype=torch.bfloat16) / size**0.5 for _ in range(8)
        ]
        self.repeats = 3 if quick else 40

    def milliseconds(self) -> float:
        """Return the median over repeats, by the host's clock."""
        times = []
        for _ in range(self.repeats + 2):
            torch.cuda.current_stream().synchronize()
            begin = time.perf_counter()
            rows = self.rows
            for n in range(40):
                rows = rows @ self.weights[n % 8]
            torch.cuda.current_stream().synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times[2:])
