"""``python -m benchmarks context --json FILE [--quick]``: parallel.context_split_from against splitting all.

Two context-parallel ranks, a third of SmolLM2-135M's layers (random weights), float32, SFT on one batch: 16
sequences of log-normal lengths (median 128 tokens, sigma 0.8, up to 512) and two of 1,536. Microbatches of
2,048 tokens over both ranks. Steps of both variants alternate in the same two processes, after a warm-up step
each; seconds are medians. ``padding`` is per step, over both ranks; ``gathered_bytes`` are keys and values
that one rank gets from the other in a step, forward and backward; ``peak_bytes`` is the peak of torch's
allocator during one more step (maximum over ranks).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.trainers import measure
from benchmarks.weights import MODELS, write_model

Row = dict[str, Any]
BUDGET, SHORT, LONG = 2048, 512, 1536
MODEL = MODELS["smollm2-135m"] | {"num_hidden_layers": 10}
SPLIT_FROM = {"all": None, f"from_{SHORT + 1}": SHORT + 1}


def make_sequences() -> list[list[int]]:
    """Return one length from each sixteenth of the distribution, and two long ones."""
    draw, distribution = random.Random(1), statistics.NormalDist(math.log(128), 0.8)
    lengths = [round(math.exp(distribution.inv_cdf((i + draw.random()) / 16))) for i in range(16)]
    lengths = [min(SHORT, n) for n in lengths] + [LONG, LONG]
    draw.shuffle(lengths)
    return [[draw.randrange(MODEL["vocab_size"]) for _ in range(n)] for n in lengths]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks context")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="3 steps of each instead of 7")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both ranks together")
    args = parser.parse_args(argv)
    sequences = make_sequences()
    job = {"sequences": sequences, "budget": BUDGET, "split_from": SPLIT_FROM}
    job |= {"repeats": 3 if args.quick else 7, "threads": args.threads}
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
        folder = Path(directory)
        write_model(folder / "model", MODEL)
        job["model"] = str(folder / "model")
        ranks = measure("benchmarks.context_trainers", "turns", job, folder, ranks=2)
    rows: list[Row] = []
    for name in SPLIT_FROM:
        row: Row = {"op": "context", "case": "cp2, 18 sequences", "impl": name} | ranks[0][name]
        row["tokens"] = sum(map(len, sequences))
        for key in ("seconds", "peak_bytes", "gathered_bytes"):
            row[key] = max(rank[name][key] for rank in ranks)
        row["cpu_seconds"] = sum(rank[name]["cpu_seconds"] for rank in ranks)
        rows.append(row)
        print({key: value for key, value in row.items() if key != "op"}, file=sys.stderr)
    every, some = rows
    ratios = {
        f"context_{key}_vs_splitting_all": some[key] / every[key]
        for key in ("seconds", "cpu_seconds", "padding", "gathered_bytes", "peak_bytes", "microbatches")
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))
