"""Measure time and memory of equivalent implementations, interleaved in one process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch

Row = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Implementation:
    """One way to compute a pass: ``prepare`` (untimed) makes the arguments of ``call``."""

    name: str
    call: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple


def measure(
    op: str, case: str, pass_name: str, implementations: list[Implementation], repeats: int
) -> list[Row]:
    """Return a row per implementation: median seconds of ``repeats`` interleaved calls, and peak extra bytes.

    Interleaving spreads machine noise over all of them. The warm-up call is not counted; peak memory is taken
    in one more call. Prints a line per row to stderr.
    """
    seconds: dict[str, list[float]] = {entry.name: [] for entry in implementations}
    for repeat in range(repeats + 1):
        for entry in implementations:
            arguments = entry.prepare()
            start = time.perf_counter()
            entry.call(*arguments)
            if repeat:
                seconds[entry.name].append(time.perf_counter() - start)
    rows: list[Row] = []
    for entry in implementations:
        row: Row = {
            "op": op,
            "case": case,
            "impl": entry.name,
            "pass": pass_name,
            "seconds": statistics.median(seconds[entry.name]),
            "peak_extra_bytes": peak_extra_bytes(entry),
        }
        rows.append(row)
        print(
            f"{op:22} {case:22} {pass_name:7} {entry.name:28} {row['seconds'] * 1e3:10.2f} ms "
            f"{row['peak_extra_bytes'] / 2**20:9.2f} MiB",
            file=sys.stderr,
        )
    return rows


def peak_extra_bytes(entry: Implementation) -> int:
    """Return the peak memory allocated by the call, minus what remains after it (results and gradients).

    Counts torch's allocator, as recorded by the profiler, in every thread and inside native ops.
    """
    arguments = entry.prepare()
    _, sizes = allocations(lambda: entry.call(*arguments))
    held = list(accumulate(sizes, initial=0))
    return max(held) - max(held[-1], 0)


def allocations(call: Callable[[], Result]) -> tuple[Result, list[int]]:
    """Return the call's result and its allocations by torch's allocator: bytes in order (freed: negative).

    The result counts as allocated. ``max(accumulate(sizes, initial=0))`` is the peak.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = call()  # kept until the profile ends
    assert profile.profiler is not None
    kineto = profile.profiler.kineto_results
    assert kineto is not None
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def seconds_of(rows: list[Row], op: str, case: str, pass_name: str) -> dict[str, float]:
    """Return seconds by implementation."""
    return {row["impl"]: row["seconds"] for row in _select(rows, op, case, pass_name)}


def bytes_of(rows: list[Row], op: str, case: str, pass_name: str) -> dict[str, int]:
    """Return peak extra bytes by implementation."""
    return {row["impl"]: row["peak_extra_bytes"] for row in _select(rows, op, case, pass_name)}


def _select(rows: list[Row], op: str, case: str, pass_name: str) -> list[Row]:
    return [row for row in rows if (row["op"], row["case"], row["pass"]) == (op, case, pass_name)]
