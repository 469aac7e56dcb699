"""``python -m benchmarks train --json FILE [--quick]``: packed SFT against TRL's, and on 2 ranks.

SmolLM2-135M (random weights of its sizes), float32, batches of 8 sequences of log-normal lengths up to 512
tokens, every sequence once, loss on every token but the first. The same tokens, in separate processes, one
trainer after the other. Tokens per second count tokens, not padding. Peak memory is the largest resident set
of a process; CPU seconds are those of all its threads during the steps. Rows of TRL: default (padded,
gradient checkpointing on), with its packing, and that without gradient checkpointing. On two ranks each has
half of the threads; nine heads do not divide by two, so tp2 has the same sizes with eight.
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

from benchmarks.train_trainers import PACK, TRAINERS
from benchmarks.trainers import MICROBATCH_TOKENS, measure
from benchmarks.weights import MODELS, write_model

Row = dict[str, Any]
BATCH = 8
MODEL_OF = {"megarl_tp2": "smollm2-135m-8-heads"}
NAMES = [name for name in TRAINERS if name != "megarl_torch"]  # which benchmarks/backends.py measures
QUICK = [name for name in NAMES if name != "trl_packed_without_checkpointing"]


def make_sequences(count: int) -> list[list[int]]:
    """Return log-normal lengths (median 128 tokens, sigma 0.8), typical of chats: every batch has one length
    from each eighth of the distribution, so a few steps are as long-tailed as many."""
    draw, distribution = random.Random(1), statistics.NormalDist(math.log(128), 0.8)
    vocab = MODELS["smollm2-135m"]["vocab_size"]
    sequences = []
    for _ in range(count // BATCH):
        lengths = [
            math.exp(distribution.inv_cdf((i + draw.uniform(0.05, 0.95)) / BATCH)) for i in range(BATCH)
        ]
        draw.shuffle(lengths)
        sequences += [[draw.randrange(vocab) for _ in range(min(PACK, round(n)))] for n in lengths]
    return sequences


def measure_row(name: str, job: dict[str, Any], folder: Path) -> Row:
    """Run one trainer once; return its row."""
    model = MODEL_OF.get(name, "smollm2-135m")
    ranks = 2 if name[-3:] in ("tp2", "pp2", "dp2") else 1
    job = job | {"model": str(folder / model)}
    results = measure("benchmarks.train_trainers", name, job, folder, ranks=ranks)
    tokens = sum(len(sequence) for sequence in job["sequences"])
    row: Row = {"op": "train", "case": f"{model} fp32, batch {BATCH}", "impl": name, "tokens": tokens}
    row |= results[0]
    row["peak_gib"] = max(result["peak_gib"] for result in results)
    row["cpu_seconds"] = sum(result["cpu_seconds"] for result in results)
    row["peak_gib_all_ranks"] = sum(result["peak_gib"] for result in results)
    row["tokens_per_second"] = tokens / row["seconds"]
    print(
        f"{name:32} {row['tokens_per_second']:7.1f} tok/s, {row['cpu_seconds']:6.1f} s of CPU, "
        f"{row['peak_gib']:6.2f} GiB a rank, "
        f"{row['built_with_gib']:5.2f} before the first step, loss {row['mean_loss']:.4f}",
        file=sys.stderr,
    )
    return row


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return medians over repeats: TRL's seconds over ours, our memory over TRL's."""

    def median(name: str, field: str) -> float:
        return statistics.median(row[field] for row in rows if row["impl"] == name)

    def speed(of: str, over: str) -> float:
        return median(of, "tokens_per_second") / median(over, "tokens_per_second")

    found = {
        "sft_packed_vs_trl_padded": speed("megarl", "trl_padded"),
        "sft_packed_vs_trl_packed": speed("megarl", "trl_packed"),
        "sft_peak_memory_vs_trl": median("megarl", "peak_gib") / median("trl_padded", "peak_gib"),
        "sft_peak_memory_vs_trl_packed": median("megarl", "peak_gib") / median("trl_packed", "peak_gib"),
    }
    names = {row["impl"] for row in rows}
    if "trl_packed_without_checkpointing" in names:
        found["sft_packed_vs_trl_packed_without_checkpointing"] = speed(
            "megarl", "trl_packed_without_checkpointing"
        )
    return found | {f"{name}_vs_megarl": speed(name, "megarl") for name in NAMES if name[:7] == "megarl_"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="2 steps, once: under 8 minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each trainer")
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), help="these trainers only (no ratios)")
    args = parser.parse_args(argv)
    names = args.only or (QUICK if args.quick else NAMES)
    steps, repeats = (2, 1) if args.quick else (3, 3)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
        folder = Path(directory)
        for model in {MODEL_OF.get(name, "smollm2-135m") for name in names}:
            write_model(folder / model, MODELS[model])
        job = {"sequences": make_sequences(steps * BATCH), "batch_size": BATCH, "threads": args.threads}
        for _ in range(repeats):  # in turn, to spread machine noise over all of them
            rows += [measure_row(name, job, folder) for name in names]
    result: Row = {"rows": rows, "ratios": {} if args.only else ratios(rows)}
    result |= {"microbatch_tokens": MICROBATCH_TOKENS, "trl_pack_tokens": PACK}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
