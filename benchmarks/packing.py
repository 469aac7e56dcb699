"""Planning and packing against peers: ``python -m benchmarks packing --json FILE [--quick] [--peers DIR]``.

Rows: seconds are medians of interleaved repetitions. ``plan`` rows also have the number of microbatches, the
lower bound ceil(tokens / budget), and the cost of the costliest of 8 ranks over their mean. The peers'
planners know neither ranks nor costs; their bins are assigned round robin, as their data loaders do.

TRL is looked up among the installed packages and in DIR (``pip install --no-deps --target DIR trl``); without
it its rows are left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch

from megarl.batching import CostModel, plan_microbatches
from megarl.ops.pack import PackedRows, RaggedTokens, pack_sequences, unpack_values
from tests.oracles.packing import pack_sequences_reference

BUDGET = 4096
NUM_RANKS = 8
MICROBATCH = (
    1 << 16
)  # tokens of the pack ratios: a large microbatch; 2^20 would time the kernel's page faults
COSTS = CostModel.transformer(
    hidden_size=576
)  # short hidden vectors make attention, the hard part, weigh most
BYTES_PER_TOKEN = 57  # pack reads id 8, mask 1, logprob 4 and writes four int64 and three float32 fields

Row = dict[str, Any]


def rollout_lengths(num_sequences: int) -> np.ndarray:
    """Return typical rollout lengths: log-normal with median 400, cut at the budget."""
    rng = np.random.default_rng(num_sequences)
    return rng.lognormal(6.0, 0.9, num_sequences).astype(np.int64).clip(1, BUDGET)


def timed(implementations: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each after a warm-up; interleaved, to spread machine noise over all."""
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for repeat in range(repeats + 1):
        for name, call in implementations.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def first_fit_decreasing(lengths: np.ndarray) -> list[list[int]]:
    """Pack in plain Python: each sequence, longest first, into the first bin with room."""
    rooms: list[int] = []
    bins: list[list[int]] = []
    sizes = lengths.tolist()
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        for number, room in enumerate(rooms):
            if room >= size:
                rooms[number] -= size
                bins[number].append(item)
                break
        else:
            rooms.append(BUDGET - size)
            bins.append([item])
    return bins


def load_trl_packer() -> Callable[[pa.Table, int], pa.Table] | None:
    """Return TRL's best-fit-decreasing packer, or None if TRL is not found."""
    try:
        packer: Callable[[pa.Table, int], pa.Table] = importlib.import_module("trl.data_utils")._pack_bfd
    except ModuleNotFoundError as error:
        print(f"TRL left out: {error}", file=sys.stderr)
        return None
    return packer


def one_byte_table(lengths: np.ndarray) -> pa.Table:
    """Return TRL's input: a list per sequence, one byte per token, so its time is planning, not copying."""
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), type=pa.int32())
    values = pa.array(np.zeros(int(lengths.sum()), dtype=np.int8))
    return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, values)})


def round_robin_imbalance(bins: list[list[int]], lengths: np.ndarray) -> float:
    """Return the costliest rank over the mean if bins are assigned round robin."""
    cost_of = COSTS.a * lengths + COSTS.b * lengths**2
    totals = [sum(cost_of[b].sum() for b in bins[rank::NUM_RANKS]) for rank in range(NUM_RANKS)]
    return float(max(totals) / statistics.fmean(totals))


def trl_bins(packed: pa.Table, lengths: np.ndarray) -> list[list[int]]:
    """Recover the sequences of TRL's bins from their lengths (equally long ones are interchangeable)."""
    by_length: dict[int, list[int]] = {}
    for item, length in enumerate(lengths.tolist()):
        by_length.setdefault(length, []).append(item)
    return [[by_length[length].pop() for length in found] for found in packed["seq_lengths"].to_pylist()]


def plan_rows(num_sequences: int, repeats: int, peers: bool) -> list[Row]:
    """Measure our planner and, with ``peers``, TRL's and first-fit decreasing, on the same lengths."""
    lengths = rollout_lengths(num_sequences)
    bound = -(-int(lengths.sum()) // BUDGET)

    def ours() -> Any:
        return plan_microbatches(lengths, max_tokens=BUDGET, num_ranks=NUM_RANKS, costs=COSTS)

    implementations: dict[str, Callable[[], Any]] = {"megarl": ours}
    packer = load_trl_packer() if peers else None
    if packer is not None:
        table = one_byte_table(lengths)
        implementations["trl"] = lambda: packer(table, BUDGET)
    if peers:
        implementations["python_first_fit_decreasing"] = lambda: first_fit_decreasing(lengths)
    seconds = timed(implementations, repeats)
    plan = ours()
    used = {"megarl": (sum(map(len, plan.microbatches)), plan.cost_imbalance)}
    if packer is not None:
        bins = trl_bins(packer(table, BUDGET), lengths)
        used["trl"] = (len(bins), round_robin_imbalance(bins, lengths))
    if peers:
        bins = first_fit_decreasing(lengths)
        used["python_first_fit_decreasing"] = (len(bins), round_robin_imbalance(bins, lengths))
    return [
        {
            "op": "plan",
            "case": f"{num_sequences} sequences",
            "impl": name,
            "pass": "forward",
            "seconds": seconds[name],
            "bins": used[name][0],
            "lower_bound": bound,
            "cost_imbalance_dp8": used[name][1],
        }
        for name in implementations
    ]


def microbatch(num_tokens: int) -> tuple[RaggedTokens, PackedRows, int]:
    """Return sequences of about num_tokens in all, ready to pack."""
    lengths = rollout_lengths(num_tokens // 100)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), num_tokens)) + 1]
    total = int(lengths.sum())
    ends = torch.from_numpy(lengths.cumsum())
    sizes = torch.from_numpy(lengths)
    tokens = RaggedTokens(
        torch.randint(1, 50_000, (total,)), (torch.rand(total) < 0.6).byte(), torch.randn(total)
    )
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    rows = PackedRows(
        ends - sizes, sizes.int(), torch.arange(len(lengths)), torch.randn(len(lengths)), cu_seqlens
    )
    return tokens, rows, total


def pack_rows(num_tokens: int, repeats: int) -> list[Row]:
    """Measure the pack kernel, the same in torch, and a copy of as many bytes as the kernel reads and writes.

    One thread each: torch's version is some forty short parallel loops, and on a busy machine it would mostly
    wait for its second thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokens, rows, total = microbatch(num_tokens)
    source = torch.ones(total * BYTES_PER_TOKEN // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    packed = pack_sequences(tokens, rows, num_tokens=total)
    starts = rows.starts
    seconds = timed(
        {
            "megarl": lambda: pack_sequences(tokens, rows, num_tokens=total),
            "torch": lambda: pack_sequences_reference(tokens, rows, num_tokens=total),
            "memcpy": lambda: target.copy_(source),
            "megarl_unpack": lambda: unpack_values(
                packed.labels, rows.cu_seqlens, rows.lengths, starts, total
            ),
        },
        repeats,
    )
    torch.set_num_threads(threads)
    case = f"{num_tokens} tokens"
    return [
        {
            "op": "pack",
            "case": case,
            "impl": name,
            "pass": "forward",
            "seconds": value,
            "bytes": total * BYTES_PER_TOKEN,
        }
        for name, value in seconds.items()
    ]


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return the figures with goals; see docs/benchmarks.md."""

    def pick(op: str, case: str, impl: str) -> Row:
        return next(r for r in rows if (r["op"], r["case"], r["impl"]) == (op, case, impl))

    million = pick("plan", "1000000 sequences", "megarl")
    ours = [r for r in rows if r["op"] == "plan" and r["impl"] == "megarl"]
    packs = {
        impl: pick("pack", f"{MICROBATCH} tokens", impl)["seconds"] for impl in ("megarl", "torch", "memcpy")
    }
    found = {
        "plan_1m_seconds": million["seconds"],
        "bins_vs_lower_bound": million["bins"] / million["lower_bound"],
        "cost_imbalance_dp8": max(r["cost_imbalance_dp8"] for r in ours),
        "pack_vs_torch": packs["torch"] / packs["megarl"],
        "pack_vs_memcpy": packs["memcpy"] / packs["megarl"],
    }
    for peer in ("trl", "python_first_fit_decreasing"):
        theirs = [r for r in rows if r["impl"] == peer]
        if theirs:
            slowest = max(theirs, key=lambda r: r["seconds"])
            mine = pick("plan", slowest["case"], "megarl")
            found[f"plan_vs_{peer}"] = slowest["seconds"] / mine["seconds"]
    return found


def main(arguments: list[str]) -> None:
    """Run all rows and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks packing", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the rows and ratios go")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--peers", type=Path, help="directory with peers that are not installed")
    options = parser.parse_args(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    torch.manual_seed(0)
    repeats = 3 if options.quick else 7
    rows = [row for n in (256, 1024, 10_000) for row in plan_rows(n, repeats, peers=True)]
    rows += plan_rows(1_000_000, repeats, peers=False)
    for num_tokens in (1 << 14, MICROBATCH, 1 << 20):
        rows += pack_rows(num_tokens, repeats=7 * repeats)
    found = ratios(rows)
    options.json.write_text(json.dumps({"rows": rows, "ratios": found}, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:40} {value:.4g}")
