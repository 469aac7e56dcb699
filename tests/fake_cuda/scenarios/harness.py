"""Run MegaRL's command line on the fake GPUs and on a CPU, with the same packages, and compare reports.

Both use the CUDA environment's packages; a CPU run is without the fake libraries, with MEGARL_PLATFORM=cpu.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.harness import GRPO, ROOT, SFT, TASK, read_lines
from tests.fake_cuda.activate import Session, cuda_python, environment

SITE = ROOT / "tests" / "fake_cuda" / "site"
PYTHON = str(cuda_python())
TIMEOUT = 900.0  # seconds for a run; generous, for a machine that does other things as well

PAIRS: dict[str, Any] = {"chosen_templates": ["{answer}"], "rejected_templates": ["{other_answer}"]}
BASES: dict[str, dict[str, Any]] = {
    "sft": SFT | {"training": {"num_steps": 4, "batch_size": 16, "validation_size": 16}},
    "dpo": {
        "data": {
            "train": {**TASK, "size": 256, "seed": 1, **PAIRS},
            "held_out": {**TASK, "size": 32, "seed": 100_000, **PAIRS},
            "format": {"chat_template": False},
        },
        "training": {"num_steps": 3, "batch_size": 8, "validation_size": 16, "validation_interval": 3},
        "optimizer": {"lr": 1e-3},
        "packing": {"max_tokens_per_microbatch": 256, "max_sequence_length": 96},
        "checkpoint": {"interval": 0},
    },
    "grpo": GRPO | {"training": {"num_steps": 2}, "checkpoint": {"interval": 0}},
    "ppo": GRPO
    | {"training": {"num_steps": 2}, "checkpoint": {"interval": 0}, "critic": {"optimizer": {"lr": 1e-3}}},
}
BASES["eval"] = {
    "data": BASES["grpo"]["data"],
    "rollout": {"max_new_tokens": 6},
    "evaluation": {"num_prompts": 8},
}
# An engine on a fake GPU: few tokens at a time, for each step is computed on the host.
ENGINE = {
    "kv_cache_gib": 0.02,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "start_timeout_seconds": 600.0,
}
for base in (BASES["grpo"], BASES["ppo"], BASES["eval"]):
    base["rollout"] = base["rollout"] | {"engine": ENGINE}


@dataclass(frozen=True)
class Finished:
    """A run directory, and what the command printed."""

    directory: Path
    output: str

    @property
    def log(self) -> str:
        """What console.log has: the output, and details that the console leaves out."""
        return (self.directory / "console.log").read_text()

    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.directory / "metrics.jsonl")

    def column(self, name: str) -> list[float]:
        """A metric over the steps that have it; empty where none has."""
        return [line[name] for line in self.steps() if line.get(name) is not None]


@dataclass
class Workbench:
    """A folder of models and runs."""

    folder: Path
    session: Session
    models: dict[str, Path] = field(default_factory=dict)

    def variables(self, where: str, **settings: str) -> dict[str, str]:
        """The environment of a run: ``where`` is cuda or cpu."""
        common = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (SITE, ROOT))),
        }
        if where == "cpu":
            return {**common, "FAKECUDA": "0", "MEGARL_PLATFORM": "cpu", **settings}
        fake = environment(PYTHON, self.session.path, devices=2, memory_gb=4.0, **settings)
        return {**common, **fake, "PYTHONPATH": common["PYTHONPATH"]}

    def python(
        self,
        where: str,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        expect: int = 0,
        log: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """The environment's Python, run to its end; no process so far may have skipped a kernel."""
        ended = subprocess.run(
            [PYTHON, *arguments],
            cwd=ROOT,
            env=self.variables(where, **(variables or {})),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if log is not None:
            log.write_text(ended.stdout + ended.stderr)
        said = f"{ended.stdout[-6000:]}\n{ended.stderr[-6000:]}"
        assert ended.returncode == expect, f"{arguments}: exit code {ended.returncode}\n{said}"
        self.check_nothing_was_skipped()
        return ended

    def run(
        self,
        where: str,
        job: str,
        name: str,
        *,
        model: Path,
        options: Mapping[str, Any] | None = None,
        variables: Mapping[str, str] | None = None,
        launch: Sequence[str] = ("-m", "megarl.cli"),
        expect: int = 0,
    ) -> Finished:
        """Run a job to its end; ``options`` are fields by their dotted names."""
        command = self.command(job, name, model=model, options=options, launch=launch)
        log = self.folder / f"{name}.log"
        ended = self.python(where, *command[1:], variables=variables, expect=expect, log=log)
        return Finished(self.folder / name, ended.stdout + ended.stderr)

    def check_nothing_was_skipped(self) -> None:
        """No process of any run so far has skipped a kernel whose result nothing computed."""
        assert not self.session.skipped(), self.session.skipped()

    def command(
        self,
        job: str,
        name: str,
        *,
        model: Path,
        options: Mapping[str, Any] | None = None,
        launch: Sequence[str] = ("-m", "megarl.cli"),
    ) -> list[str]:
        """The command line, whose configuration is written to NAME.yaml."""
        config = copy.deepcopy(BASES[job])
        fields = {"run.dir": str(self.folder / name), "model.path": str(model), **(options or {})}
        for dotted, value in fields.items():
            *sections, last = dotted.split(".")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return [PYTHON, *launch, job, "--config", str(path)]

    def make_model(self, name: str, *, num_experts: int = 0) -> Path:
        """Two layers, hidden 64, two heads; made once."""
        if name not in self.models:
            path = self.folder / f"model-{name}"
            sizes = ["--layers", "2", "--hidden", "64", "--heads", "2", "--kv-heads", "2", "--head-dim", "32"]
            sizes += ["--intermediate", "128", "--seed", "1", "--output", str(path)]
            if num_experts:
                sizes += ["--experts", str(num_experts)]
            self.python("cpu", "tools/make_tiny_model.py", *sizes)
            self.models[name] = path
        return self.models[name]

    def taught_model(self, name: str, *, num_experts: int = 0) -> Path:
        """The same after 40 steps of SFT on a CPU: of its samples some are right, and others are not."""
        taught = f"{name}-taught"
        if taught not in self.models:
            model = self.make_model(name, num_experts=num_experts)
            options = {"training.num_steps": 40}
            run = self.run("cpu", "sft", f"sft-{name}", model=model, options=options)
            self.models[taught] = run.directory / "hf"
        return self.models[taught]

    def keep(self, name: str, target: str) -> Path:
        """A copy of a run directory, to resume from."""
        shutil.copytree(self.folder / name, self.folder / target)
        return self.folder / target


@dataclass(frozen=True)
class Compared:
    """One figure of two runs."""

    scenario: str
    figure: str
    count: int
    difference: float  # largest, relative to the larger of 1e-3 and the CPU's value
    allowed: float

    @property
    def passed(self) -> bool:
        return self.count > 0 and self.difference <= self.allowed


def compare(scenario: str, cuda: Finished, cpu: Finished, figures: Mapping[str, float]) -> list[Compared]:
    """Every figure of ``figures`` (with what it may differ), over all steps of both runs."""
    rows = []
    for figure, allowed in figures.items():
        ours, theirs = cuda.column(figure), cpu.column(figure)
        assert len(ours) == len(theirs), f"{scenario}: {figure} has {len(ours)} and {len(theirs)} values"
        difference = max(
            (abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=True)), default=float("inf")
        )
        rows.append(Compared(scenario, figure, len(ours), difference, allowed))
    return rows


def table(rows: Sequence[Compared]) -> str:
    """The rows as text."""
    head = f"{'scenario':44} {'figure':22} {'values':>6} {'difference':>11} {'allowed':>9}"
    lines = [
        f"{row.scenario:44} {row.figure:22} {row.count:6} {row.difference:11.1e} {row.allowed:9.0e}"
        f"{'' if row.passed else '  DIFFERS'}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def write_table(rows: Sequence[Compared], path: Path) -> None:
    """The rows as JSON, for the notes of a release."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([vars(row) | {"passed": row.passed} for row in rows], indent=1))
