"""Run the quickstart: tiny model -> SFT warm-up -> GRPO with an engine -> report.

Start it again to resume an interrupted run. ``--seed N`` (N > 1) and overrides such as
``rollout.engine.backend=hf`` run in separate directories.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the three commands a user would, and show the outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of model, data and sampling")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of both parts; rollout.* of GRPO's"
    )
    parser.add_argument("--min-gain", type=float, default=0.0, help="points of accuracy; less is exit code 1")
    arguments = parser.parse_args()
    seed, overrides = arguments.seed, arguments.overrides
    names = [f"seed{seed}"] * (seed != 1) + [re.sub(r"[^\w.=]+", "-", each) for each in overrides]
    run = Path("-".join(["runs/quickstart", *names]))
    started = time.perf_counter()
    if (ROOT / run / "summary.json").exists():
        print(f"{run} is complete; remove it to run again (rm -r {run}).")
        return show(run, arguments.min_gain)
    commands = []
    if not (ROOT / run / "model" / "config.json").exists():
        commands.append(["tools/make_tiny_model.py", "--output", f"{run}/model", "--seed", str(seed)])
    at = [f"run.seed={seed}"]
    general = [each for each in overrides if not each.startswith("rollout.")]
    if not (ROOT / run / "sft" / "summary.json").exists():
        paths = [f"run.dir={run}/sft", f"model.path={run}/model"]
        commands.append(
            ["-m", "megarl.cli", "sft", "--config", "configs/quickstart_sft.yaml", *at, *paths, *general]
        )
    paths = [f"run.dir={run}", f"model.path={run}/sft/hf"]
    commands.append(
        ["-m", "megarl.cli", "grpo", "--config", "configs/quickstart_grpo.yaml", *at, *paths, *overrides]
    )
    for command in commands:
        print(f"$ python {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            return code
    code = show(run, arguments.min_gain)
    print(f"Quickstart took {time.perf_counter() - started:.0f} s.")
    return code


def show(run: Path, min_gain: float) -> int:
    """Print the figures of summary.json and the path of the report; 1 if accuracy gained too little."""
    summary = json.loads((ROOT / run / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"Held-out greedy accuracy: {before:.1%} -> {after:.1%} in {summary['grpo_steps']} GRPO steps; "
        f"weights moved to the engine: {summary['weights_bytes_moved']} bytes; "
        f"largest engine/trainer logprob difference: {summary['logprob_abs_diff_max']:.1e}"
    )
    print(f"Open {run}/report.html in a browser.")
    if 100 * (after - before) < min_gain:
        print(f"Accuracy gained less than {min_gain:g} points.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
