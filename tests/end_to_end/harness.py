"""Drive the real command line in subprocesses, and read the files of a run."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

# Sums of two digits, learned in a few steps to the point where some samples are right and others are not.
TASK = {
    "source": "reasoning_gym",
    "task": "chain_sum",
    "arguments": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SFT: dict[str, Any] = {
    "data": {
        "train": {**TASK, "size": 512, "seed": 1},
        "held_out": {**TASK, "size": 32, "seed": 100_000},
        "format": {"chat_template": False},
    },
    "training": {"num_steps": 40, "batch_size": 16, "validation_size": 32},
    "optimizer": {"lr": 3e-3},
    "packing": {"max_tokens_per_microbatch": 160, "max_sequence_length": 96},
    "checkpoint": {"interval": 0},
}
GRPO: dict[str, Any] = {
    "data": {
        # There are about 200 such sums: a larger training set would leave none to evaluate.
        "train": {**TASK, "size": 64, "seed": 1000},
        "held_out": {**TASK, "size": 64, "seed": 100_000},
        "format": {"chat_template": False},
    },
    "rollout": {
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 4,
        "max_new_tokens": 6,
        "engine": {"kv_cache_gib": 0.05, "num_threads": 1, "start_timeout_seconds": 1200.0},
    },
    "evaluation": {"num_prompts": 8},
    "training": {"num_steps": 4},
    "optimizer": {"lr": 1e-3},
    "packing": {"max_tokens_per_microbatch": 160, "max_sequence_length": 96},
    "checkpoint": {"interval": 1, "keep": 8},
}


def make_model(path: Path, *, kv_heads: int = 1, intermediate: int = 128, num_experts: int = 0) -> Path:
    """A model of two layers with a real tokenizer, hidden size 64, written to ``path``."""
    sizes = {
        "layers": 2,
        "hidden": 64,
        "heads": 2,
        "kv-heads": kv_heads,
        "head-dim": 32,
        "intermediate": intermediate,
    }
    if num_experts:
        sizes["experts"] = num_experts
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "tools/make_tiny_model.py", "--output", str(path), "--seed", "1", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return path


def write_config(
    path: Path, base: dict[str, Any], *, run_dir: Path, model: Path, **sections: dict[str, Any]
) -> Path:
    """``base`` with whole fields of some sections replaced, as a YAML file at ``path``."""
    config = copy.deepcopy(base)
    for section, fields in sections.items():
        config.setdefault(section, {}).update(fields)
    config["run"] = {"dir": str(run_dir)}
    config["model"] = {"path": str(model)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def wait_until(
    process: subprocess.Popen[bytes], condition: Callable[[], Any], output: Path, timeout: float = 1500
) -> None:
    """Poll until ``condition()`` holds; the process, which writes to ``output``, must run all the while."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended before it was stopped:\n{output.read_text()}"
        assert time.monotonic() < deadline, f"nothing happened in {timeout} s:\n{output.read_text()}"
        time.sleep(0.002)


class Command:
    """One ``python -m megarl.cli ...``; its output (both streams) goes to a file."""

    def __init__(self, *arguments: str | Path, output: Path) -> None:
        self.output_path = output
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megarl.cli", *map(str, arguments)],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def wait(self, timeout: float = 1500) -> int:
        """Return the exit code; a command that takes longer is killed."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is cleaned up."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_until(self, condition: Callable[[], Any], timeout: float = 1500) -> None:
        """Poll until ``condition()`` holds; the command must keep running meanwhile."""
        wait_until(self.process, condition, self.output_path, timeout)

    def freeze_when(self, condition: Callable[[], Any], timeout: float = 1500) -> None:
        """Poll with the process stopped until ``condition()`` holds, so nothing changes after the check."""
        while True:
            self.wait_until(condition, timeout)
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if condition():
                return
            self.process.send_signal(signal.SIGCONT)


def run(*arguments: str | Path, output: Path) -> str:
    """Run a command that must succeed; return its output."""
    command = Command(*arguments, output=output)
    code = command.wait()
    assert code == 0, f"exit code {code}:\n{command.output}"
    return command.output


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; a half-written last line of a running command is skipped."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the training steps of metrics.jsonl (the evaluation before them is step 0)."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if line["step"] > 0]


def column(run_dir: Path, name: str) -> list[float]:
    """Return one metric over the training steps."""
    return [step[name] for step in read_steps(run_dir)]


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def checkpoints(run_dir: Path) -> list[str]:
    """Return the names in checkpoints/, partial ones included."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
