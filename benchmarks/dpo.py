"""``python -m benchmarks dpo --json FILE [--quick]``: packed preference training against TRL's DPOTrainer.

SmolLM2-135M (random weights of its sizes), float32, batches of 8 pairs, every pair once. The same tokens, in
separate processes, one after the other. Tokens per second count tokens, not padding, over all steps and the
reference logprobs (ours are computed before the first step, TRL's in every step). Peak memory is the largest
resident set of the process. Rows of TRL: default (gradient checkpointing on), with precomputed reference
logprobs, and without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.dpo_trainers import TRAINERS
from benchmarks.trainers import MICROBATCH_TOKENS, measure
from benchmarks.weights import MODELS, write_model

Row = dict[str, Any]
MODEL, BATCH = "smollm2-135m", 8
LONGEST = 384  # prompt and response; a pair fits into MICROBATCH_TOKENS


def make_pairs(count: int) -> list[list[list[int]]]:
    """Return prompts and two responses of log-normal lengths (medians 48 and 96 tokens), typical of chats."""
    draw = random.Random(1)

    def tokens(median: int, most: int) -> list[int]:
        length = min(most, max(4, round(median * draw.lognormvariate(0.0, 0.7))))
        return [draw.randrange(MODELS[MODEL]["vocab_size"]) for _ in range(length)]

    pairs = []
    for _ in range(count):
        prompt = tokens(48, LONGEST // 2)
        pairs.append([prompt, *(tokens(96, LONGEST - len(prompt)) for _ in range(2))])
    return pairs


def measure_row(name: str, job: dict[str, Any], folder: Path) -> Row:
    """Run one trainer once; return its row."""
    [result] = measure("benchmarks.dpo_trainers", name, job, folder)
    tokens = sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in job["pairs"])
    row: Row = {"op": "dpo", "case": f"{MODEL} fp32, {BATCH} pairs", "impl": name, "tokens": tokens, **result}
    row["tokens_per_second"] = tokens / (result["seconds"] + result["reference_seconds"])
    row["tokens_per_second_without_reference"] = tokens / result["seconds"]
    print(
        f"{name:26} {row['tokens_per_second']:8.1f} tok/s "
        f"({row['tokens_per_second_without_reference']:.1f} in the steps alone) {row['peak_gib']:6.2f} GiB",
        file=sys.stderr,
    )
    return row


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return medians over repeats: ours relative to TRL's default, and to the best of its variants."""

    def median(name: str, field: str) -> float:
        return statistics.median(row[field] for row in rows if row["impl"] == name)

    peers = sorted({row["impl"] for row in rows} - {"megarl"})
    speed, memory = "tokens_per_second", "peak_gib"
    fastest = max(median(peer, speed) for peer in peers)
    smallest = min(median(peer, memory) for peer in peers)
    alone = "tokens_per_second_without_reference"
    return {
        "dpo_vs_trl": median("megarl", speed) / median("trl", speed),
        "dpo_peak_memory_vs_trl": median("megarl", memory) / median("trl", memory),
        "dpo_vs_best_trl": median("megarl", speed) / fastest,
        "dpo_peak_memory_vs_best_trl": median("megarl", memory) / smallest,
        "dpo_later_epochs_vs_trl": median("megarl", alone) / median("trl", speed),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks dpo")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="2 steps, once, without variants of TRL")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process")
    args = parser.parse_args(argv)
    names = ["megarl", "trl"] if args.quick else list(TRAINERS)
    steps, repeats = (2, 1) if args.quick else (3, 3)
    rows = []
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
        folder = Path(directory)
        write_model(folder / MODEL, MODELS[MODEL])
        job = {
            "model": str(folder / MODEL),
            "pairs": make_pairs(steps * BATCH),
            "batch_size": BATCH,
            "threads": args.threads,
        }
        for _ in range(repeats):  # in turn, to spread machine noise over all of them
            rows += [measure_row(name, job, folder) for name in names]
    result = {"rows": rows, "ratios": ratios(rows), "microbatch_tokens": MICROBATCH_TOKENS}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
