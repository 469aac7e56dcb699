"""Check that a run fits its GPUs, by the figures of `megarl plan`, before anything is allocated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

import torch

from megarl.config.model import read_model_config
from megarl.config.online import OnlineConfig
from megarl.config.training import TrainingRoot
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.table import Architecture
from megarl.simulate import fsdp
from megarl.simulate.layouts import Layouts
from megarl.simulate.memory import GIB, GpuMemory, trainer_memory, while_generating, while_training
from megarl.simulate.of_run import plan_of
from megarl.simulate.shapes import stage_shapes


def least_memory(
    config: TrainingRoot, architecture: Architecture, layout: ParallelLayout, at: RankCoordinates, rank: int
) -> GpuMemory:
    """Return a lower bound of the memory on a trainer rank's GPU, counted as in `megarl plan`.

    Excluded are activations, which depend on the data, a critic or teacher, and engine parameters, of which
    an unknown part is aliased.
    """
    plan = plan_of(config, read_model_config(config.model.path))
    layouts = Layouts(layout, layout, 1, colocated=True)
    if plan.trainer.backend == "torch":
        one = plan.trainer.model_copy(update={"num_microbatches": 1})
        memory = fsdp.rank_memory(plan.model_copy(update={"trainer": one}), architecture, layouts)
    else:
        shapes = stage_shapes(architecture, "trainer", layout, at)
        memory = trainer_memory(plan, architecture, layouts, at.pipeline, shapes)
    cache = 0
    if isinstance(config, OnlineConfig) and rank < config.rollout.engine.tensor_parallel_size:
        cache = int(config.rollout.engine.kv_cache_gib * GIB)
    return replace(memory, activations=0, kv_cache=cache)


def too_small(
    memory: GpuMemory, offload: Collection[str], free: int, device: str, backend: str = "megatron"
) -> str | None:
    """Return an error line if the memory does not fit into ``free`` bytes, else None."""
    phases = while_training(memory, offload), while_generating(memory, offload)
    fullest = max(phases, key=lambda phase: phase.total)
    if fullest.total <= free:
        return None
    sizes = {field.name.replace("_", " "): getattr(fullest, field.name) for field in fields(fullest)}
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    return (
        f"parallel: {device} has {free / GIB:.2f} GiB free, and this run needs {fullest.total / GIB:.2f} "
        f"there before activations ({parts}); split it over more ranks, or "
        f"use {_SAVES[backend]} or lora"
    )


_SAVES = {"megatron": "optimizer.distributed", "torch": "trainer.cpu_offload"}


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU in bytes, from the driver."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
