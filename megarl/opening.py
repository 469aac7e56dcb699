"""The first line of a run, made of its configuration and config.json before anything heavy loads."""

from __future__ import annotations

import math
from typing import Any

from megarl.errors import UserError
from megarl.jobs import Job
from megarl.models import load_architecture
from megarl.terminal import short_count


def opening(job: Job, config: Any) -> str:
    """Return what is about to run, where: "megarl sft: runs/x | Qwen3 0.85M float32 | 800 steps of ..."."""
    parts = [_model(config), _steps(job, config)]
    if job.trains and (count := config.parallel.num_processes) > 1:
        parts.append(f"{count} processes")
    return f"megarl {job.name}: " + " | ".join([config.run.dir, *filter(None, parts)])


def _model(config: Any) -> str:
    path, dtype = config.model.path, config.model.dtype
    name = getattr(path, "written", path)  # of a model of the hub, its id
    try:
        architecture = load_architecture(path)
    except UserError:  # a Megatron checkpoint, or a family without a table
        return f"{name} {dtype}"
    count = sum(math.prod(shape) for shape in architecture.hf_shapes().values())
    return f"{name} ({short_count(count)} parameters, {dtype})"


def _steps(job: Job, config: Any) -> str:
    if not job.trains:
        return ""
    training, rollout = config.training, getattr(config, "rollout", None)
    if rollout is None:
        each = f"{training.batch_size} {job.data.noun}"
    else:
        each = f"{rollout.num_prompts_per_step} x {rollout.num_generations_per_prompt} samples"
    if training.num_steps is None:
        return f"{training.num_epochs:g} epochs in steps of {each}"
    return f"{training.num_steps:,} steps of {each}"
