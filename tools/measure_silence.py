"""Measure how long each command says nothing, at a terminal and in a pipe.

python tools/measure_silence.py MODEL            all commands, on a model directory (tools/make_tiny_model.py)
python tools/measure_silence.py MODEL report     some of them

Two figures per command and place: seconds to the first output, and the longest gap from the start to the end.
At a terminal a gap is at most 2 s; in a pipe a line says within that what goes on, and again every half
minute. Where torch is imported, which one cannot interrupt, a busy machine takes longer.
Exit code 1 if a terminal's gap or a pipe's first output takes longer than --limit.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QWEN = ROOT / "configs" / "models" / "qwen3_30b_a3b"
LIMIT = 2.0
_READ_EVERY = 0.05  # seconds
_KEPT = 2000  # characters, of which the last line is shown


@dataclass(frozen=True, slots=True)
class Silence:
    """Seconds to the first output, of the longest silence and in all; exit code; last words before it."""

    first: float
    longest: float
    total: float
    code: int
    after: str


def measure(command: list[str], cwd: Path, *, at_terminal: bool, timeout: float = 600.0) -> Silence:
    """Run a command with its output and errors in one terminal or pipe."""
    reader, writer = pty.openpty() if at_terminal else os.pipe()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer
    )
    os.close(writer)
    said, longest, first = started, 0.0, None
    text = after = ""
    try:
        while True:
            if select.select([reader], [], [], _READ_EVERY)[0]:
                try:
                    data = os.read(reader, 65536)
                except OSError:  # a terminal without a process
                    data = b""
                now = time.monotonic()
                if now - said > longest:
                    longest, after = now - said, _last_line(text)
                said, text = now, (text + data.decode(errors="replace"))[-_KEPT:]
                if not data:
                    break
                first = now - started if first is None else first
            elif time.monotonic() - started > timeout:
                process.kill()
        code = process.wait()
    finally:
        os.close(reader)
    total = time.monotonic() - started
    return Silence(total if first is None else first, longest, total, code, after)


def _last_line(text: str) -> str:
    lines = [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if line.strip()
    ]
    return lines[-1].strip()[:60] if lines else ""


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """Return name -> arguments of `megarl`; in order, for later ones read what earlier ones write."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 2 =", "response": "3", "answer": "3"}\n' * 64)
    sft = [f"model.path={model}", "run.dir=sft", "training.num_steps=4", "training.batch_size=8"]
    sft += ["optimizer.lr=1e-3", "data.train.source=jsonl", f"data.train.path={rows}"]
    sft += ["packing.max_sequence_length=128", "data.format.chat_template=false"]
    adapters = [*sft, "run.dir=lora", "lora.rank=2", "lora.export=adapter"]
    gym = "{source: reasoning_gym, task: chain_sum, size: 64, seed: %d}"
    grpo = [f"model.path={model}", "run.dir=grpo", "training.num_steps=1", "optimizer.lr=1e-4"]
    grpo += [f"data.train={gym % 0}", "rollout.num_prompts_per_step=2", "rollout.max_new_tokens=8"]
    grpo += ["rollout.num_generations_per_prompt=2", "packing.max_sequence_length=128"]
    grpo += ["rollout.engine.kv_cache_gib=0.05"]
    config = folder / "grpo.yaml"
    evaluation = [
        f"model.path={model}",
        "run.dir=eval",
        f"data.held_out={gym % 1000}",
        "evaluation.num_prompts=4",
    ]
    evaluation += ["rollout.max_new_tokens=8", "rollout.engine.kv_cache_gib=0.05"]
    config.write_text(
        f"run: {{dir: grpo}}\nmodel: {{path: {model}}}\noptimizer: {{lr: 1e-4}}\ntraining: {{num_steps: 1}}\n"
        f"data: {{train: {gym % 0}}}\npacking: {{max_sequence_length: 128}}\n"
        "rollout: {num_prompts_per_step: 2, num_generations_per_prompt: 2, max_new_tokens: 8}\n"
    )
    return {
        "help": ["--help"],
        "config": ["config", "optimizer.lr"],
        "recipes": ["recipes", "ls"],
        "plan": [
            "plan",
            "-c",
            str(ROOT / "configs/plan_qwen3_30b_a3b.yaml"),
            "--gpus",
            "32",
            f"model.path={QWEN}",
        ],
        "init": ["init", "sft", "--model", str(model), "--data", str(rows), "--out", "new.yaml"],
        "data inspect": ["data", "inspect", str(config)],
        "env try": ["env", "try", str(config), "--answer", "3"],
        "dry run": ["grpo", str(config), "--dry-run"],
        "refusal": ["sft", *sft, "optimizer.lrr=1"],
        "doctor": ["doctor"],
        "sft": ["sft", *sft],
        "lora": ["sft", *adapters],
        "merge": ["merge", "lora", "merged"],
        "convert": ["convert", "hf-to-megatron", str(model), "megatron"],
        "report": ["report", "sft"],
        "compare": ["compare", "sft", "lora"],
        "push": ["push", "sft", "org/name", "--dry-run"],
        "grpo": ["grpo", *grpo],
        "eval": ["eval", *evaluation],
    }


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("names", nargs="*", help="commands of the table; default: all")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds (default {LIMIT:g})")
    options = parser.parse_args()
    too_long = 0
    print(
        f"{'':14}{'terminal: first':>16}{'gap':>7}{'all':>7}   {'pipe: first':>12}{'gap':>7}{'all':>7}  code"
    )
    places = [tempfile.TemporaryDirectory(prefix="megarl-silence-") for _ in range(2)]
    listed = [commands(options.model.resolve(), Path(place.name)) for place in places]
    if unknown := set(options.names) - listed[0].keys():
        parser.error(f"no command {', '.join(sorted(unknown))}; there are {', '.join(listed[0])}")

    def run(place: int, name: str) -> Silence:
        command = [sys.executable, "-m", "megarl", *listed[place][name]]
        return measure(command, Path(places[place].name), at_terminal=place == 0)

    for name in options.names or listed[0]:
        terminal, pipe = run(0, name), run(1, name)
        late = terminal.longest > options.limit or pipe.first > options.limit
        too_long += late
        print(
            f"{name:14}{terminal.first:16.1f}{terminal.longest:7.1f}{terminal.total:7.1f}   "
            f"{pipe.first:12.1f}{pipe.longest:7.1f}{pipe.total:7.1f}  {terminal.code} {pipe.code}"
            f"{f'  TOO LONG, after: {terminal.after}' if late else ''}",
            flush=True,
        )
    for place in places:
        place.cleanup()
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
