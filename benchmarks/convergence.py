"""``python -m benchmarks convergence --json FILE [--quick]``: GRPO against PPO on the quickstart's task.

Both start from the same warm-up model (tiny model and SFT as in the quickstart, one per seed), draw equally
many samples per step of the same problems, and use the same policy optimizer (configs/quickstart_grpo.yaml
and quickstart_ppo.yaml). Held-out greedy accuracy is measured every few steps. Reported for a target
accuracy: samples drawn and seconds of the steps until then (without evaluations and start-up), both
interpolated between the two evaluations around it; None if a run never reaches it. The target is --target, or
else the lowest final accuracy of the runs, which all of them reach.

``--tune`` runs PPO on the first seed with each of TUNING and uses the best (highest mean accuracy over the
evaluations) for the comparison; otherwise the configuration's settings are used, which were chosen from
TUNING as described in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from megarl.run_directory import read_metrics

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "reward", "logprobs", "train", "weights")
INTERVAL = 5
# PPO's search space: the critic's learning rate, the horizon of its advantages, and passes over a batch.
TUNING = [
    [f"critic.optimizer.lr={lr}", f"algorithm.gae_lambda={lam}", f"algorithm.num_epochs_per_batch={epochs}"]
    for lr, lam, epochs in (
        ("1e-3", 0.95, 1),
        ("1e-3", 1.0, 1),
        ("3e-4", 0.95, 1),
        ("3e-4", 1.0, 1),
        ("1e-3", 1.0, 2),
    )
]


def command(*arguments: str | Path, log: Path) -> None:
    """Run a command, output to ``log``; raise if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        text = [sys.executable, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = subprocess.run(text, cwd=ROOT, stdout=file, stderr=file, env=environment).returncode
    if code:
        sys.exit(f"{' '.join(text)}\nended with exit code {code}; its output is in {log}")


def warm_up(folder: Path, seed: int) -> Path:
    """Make the warm-up model of both algorithms, once."""
    model = folder / "sft" / "hf"
    if not (model / "config.json").exists():
        log = folder / "log.txt"
        command("tools/make_tiny_model.py", "--output", folder / "model", "--seed", str(seed), log=log)
        paths = [f"run.dir={folder / 'sft'}", f"model.path={folder / 'model'}", f"run.seed={seed}"]
        command("-m", "megarl.cli", "sft", "--config", "configs/quickstart_sft.yaml", *paths, log=log)
    return model


def train(folder: Path, name: str, kind: str, seed: int, steps: int, overrides: list[str]) -> Row:
    """Run one training; return its evaluations from the log."""
    model, directory = warm_up(folder, seed), folder / name
    command(
        *("-m", "megarl.cli", kind, "--config", f"configs/quickstart_{kind}.yaml"),
        *(f"run.dir={directory}", f"run.seed={seed}", f"model.path={model}", f"training.num_steps={steps}"),
        *(f"evaluation.interval={INTERVAL}", "checkpoint.interval=0", "checkpoint.export_hf=false"),
        *overrides,
        log=folder / "log.txt",
    )
    lines = read_metrics(directory)
    config = (directory / "config.yaml").read_text()
    per_step = _samples_per_step(config)
    seconds, points = 0.0, []
    for line in lines:
        seconds += sum(line.get(f"seconds_{phase}", 0.0) for phase in PHASES)
        if "accuracy" in line:
            points.append([line["step"] * per_step, seconds, line["accuracy"]])
    row: Row = {"op": "convergence", "case": f"seed {seed}", "impl": kind, "overrides": overrides}
    row |= {"samples_seconds_accuracy": points, "accuracy": points[-1][2], "seconds": seconds}
    row["mean_accuracy"] = statistics.mean(point[2] for point in points)
    print(
        f"{kind:5} seed {seed} {' '.join(overrides)}: {points[0][2]:.1%} -> {points[-1][2]:.1%}, "
        f"{seconds:.0f} s in {lines[-1]['step']} steps",
        file=sys.stderr,
        flush=True,
    )
    return row


def _samples_per_step(config: str) -> int:
    import yaml

    rollout = yaml.safe_load(config)["rollout"]
    return int(rollout["num_prompts_per_step"]) * int(rollout["num_generations_per_prompt"])


def reach(points: list[list[float]], target: float) -> tuple[float, float] | None:
    """Return samples and seconds at the first accuracy of ``target``, interpolated between evaluations."""
    if points[0][2] >= target:
        return points[0][0], points[0][1]
    for before, after in pairwise(points):
        if after[2] >= target:
            share = (target - before[2]) / (after[2] - before[2])
            samples, seconds = (before[i] + share * (after[i] - before[i]) for i in (0, 1))
            return samples, seconds
    return None


def summarize(rows: list[Row], target: float | None) -> dict[str, Any]:
    """Return the report: medians over seeds, and PPO's relative to GRPO's."""
    target = target if target is not None else min(row["accuracy"] for row in rows)
    for row in rows:
        found = reach(row["samples_seconds_accuracy"], target)
        row["samples_to_target"], row["seconds_to_target"] = found or (None, None)

    def median(kind: str, name: str) -> float | None:
        values = [row[name] for row in rows if row["impl"] == kind]
        return None if None in values else statistics.median(values)

    def ratio(name: str) -> float | None:
        ppo, grpo = median("ppo", name), median("grpo", name)
        return ppo / grpo if ppo is not None and grpo else None

    return {
        "target_accuracy": target,
        "ratios": {
            "grpo_vs_ppo_wall": ratio("seconds_to_target"),
            "grpo_vs_ppo_samples": ratio("samples_to_target"),
        },
        "medians": {
            kind: {
                name: median(kind, name) for name in ("accuracy", "samples_to_target", "seconds_to_target")
            }
            for kind in ("grpo", "ppo")
        },
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--target", type=float, help="accuracy to reach")
    parser.add_argument("--tune", action="store_true", help="choose PPO's settings on the first seed")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "convergence", help="where runs go")
    args = parser.parse_args(argv)
    seeds = [1] if args.quick else [1, 2, 3]
    directory = args.dir.resolve()
    tuning, chosen = [], []
    if args.tune:
        for number, overrides in enumerate(TUNING):
            folder = directory / "seed1"
            tuning.append(train(folder, f"tune{number}", "ppo", 1, args.steps, overrides))
        chosen = max(tuning, key=lambda row: row["mean_accuracy"])["overrides"]
    rows = []
    for seed in seeds:
        folder = directory / f"seed{seed}"
        rows.append(train(folder, "grpo", "grpo", seed, args.steps, []))
        rows.append(train(folder, "ppo", "ppo", seed, args.steps, chosen))
    result = summarize(rows, args.target) | {"rows": rows, "tuning": tuning, "steps": args.steps}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("target_accuracy", "ratios", "medians")}, indent=2))
