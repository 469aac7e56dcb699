"""Helpers of the trainer benchmarks: measured processes, data, and TRL's setup.

Every trainer runs in separate processes, ``python -m benchmarks.NAME_trainers TRAINER JOB RESULT``: JOB is a
JSON file with the model's directory and the tokens, RESULT.RANK gets seconds and the rank's peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

MICROBATCH_TOKENS = 1024
Trainer = Callable[[dict[str, Any]], dict[str, float]]


def peak_gib() -> float:
    """Return this process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(
    module: str, name: str, job: dict[str, Any], folder: Path, *, ranks: int = 1
) -> list[dict[str, Any]]:
    """Run one trainer in ``ranks`` processes, which share ``job["threads"]``; return their results."""
    job = job | {"threads": max(1, job["threads"] // ranks)}
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job))
    command = [sys.executable, "-m", module, name, str(job_file), str(result_file)]
    shared = {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    shared |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    # With a master address even a single process would open a store, and TRL would wait for others.
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            shared |= {"WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        mine = {"RANK": str(rank)} if ranks > 1 else {}
        environment = inherited | shared | mine
        processes.append(subprocess.Popen(command, stdout=sys.stderr, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{module} {name} failed: exit codes {codes} by rank")
    return [json.loads(Path(f"{result_file}.{rank}").read_text()) for rank in range(ranks)]


def run_trainer(trainers: dict[str, Trainer], arguments: list[str]) -> None:
    """Run one trainer and write its measurements; called in the process that :func:`measure` starts."""
    name, job_file, result_file = arguments
    import torch

    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    result = trainers[name](job)
    rank = os.environ.get("RANK", "0")
    Path(f"{result_file}.{rank}").write_text(json.dumps(result | {"peak_gib": peak_gib()}))


class Stopwatch:
    """Wall seconds and CPU seconds of all of this process's threads since the start."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start at zero."""
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return the seconds so far."""
        wall, cpu = self._began
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def clock(into: dict[str, float]) -> Any:
    """Return a callback of the Hugging Face trainer that writes the time of all steps to ``into``."""
    from transformers import TrainerCallback

    watch = Stopwatch()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            into.update(watch.read())

    return Clock()


def megarl_policy(
    job: dict[str, Any], num_steps: int, backend: Literal["megatron", "torch"] = "megatron", **parallel: Any
) -> tuple[Any, dict[str, float]]:
    """Build MegaRL's trainer of ``job["model"]`` on this rank; also return the memory before it."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.parallel import ParallelConfig
    from megarl.config.trainer import TrainerConfig
    from megarl.models import load_architecture
    from megarl.trainer.build import initialize, trainer_class

    context = initialize(ParallelConfig(**parallel), 1, TrainerConfig(backend=backend))
    kind = trainer_class(context)
    started_with = peak_gib()
    policy = kind(
        context,
        load_architecture(job["model"]),
        ModelConfig(path=job["model"]),
        PackingConfig(max_tokens_per_microbatch=MICROBATCH_TOKENS),
        OptimizerConfig(lr=1e-6),
        num_steps,
    )
    return policy, {"started_with_gib": started_with}


def bare_tokenizer() -> Any:
    """Return a tokenizer for TRL, which requires one even for tokenised data."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]")


def arguments(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return all TRL trainers' arguments: float32 on the CPU, one epoch, one learning rate, no saving."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
