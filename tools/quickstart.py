"""The main job in one command: tiny model -> SFT warm-up -> GRPO with a vLLM engine -> report.

Interrupted, it goes on where it stopped when started again. ``--seed N`` (N > 1) runs another seed in
a directory of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the three commands a user would, and show the outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of model, data and sampling")
    seed = parser.parse_args().seed
    run = Path("runs/quickstart" if seed == 1 else f"runs/quickstart-seed{seed}")
    started = time.perf_counter()
    if (ROOT / run / "summary.json").exists():
        print(f"{run} is complete; remove it to run again (rm -r {run}).")
        return show(run)
    commands = []
    if not (ROOT / run / "model" / "config.json").exists():
        commands.append(["tools/make_tiny_model.py", "--output", f"{run}/model", "--seed", str(seed)])
    at = [f"run.seed={seed}"]
    if not (ROOT / run / "sft" / "summary.json").exists():
        paths = [f"run.dir={run}/sft", f"model.path={run}/model"]
        commands.append(["-m", "megarl.cli", "sft", "--config", "configs/quickstart_sft.yaml", *at, *paths])
    paths = [f"run.dir={run}", f"model.path={run}/sft/hf"]
    commands.append(["-m", "megarl.cli", "grpo", "--config", "configs/quickstart_grpo.yaml", *at, *paths])
    for command in commands:
        print(f"$ python {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            return code
    code = show(run)
    print(f"Quickstart took {time.perf_counter() - started:.0f} s.")
    return code


def show(run: Path) -> int:
    """Print what summary.json says and name the report."""
    summary = json.loads((ROOT / run / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"Held-out greedy accuracy: {before:.1%} -> {after:.1%} in {summary['grpo_steps']} GRPO steps; "
        f"weights moved to the engine: {summary['weights_bytes_moved']} bytes; "
        f"largest engine/trainer logprob difference: {summary['logprob_abs_diff_max']:.1e}"
    )
    print(f"Open {run}/report.html in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
