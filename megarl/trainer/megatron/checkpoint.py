"""Megatron distributed checkpoints of weights, optimizer and schedule, and each rank's random state."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megarl.errors import UserError

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(directory: Path, chunks: list[Any], optimizer: Any | None, schedule: Any) -> None:
    """Write into ``directory`` (existing, empty). It is complete when the call returns on all ranks."""
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["schedule"] = schedule.state_dict()
    dist_checkpointing.save(state, str(directory), async_sharded_save=False)
    with _rng_file(directory, dist.get_rank()).open("wb") as file:
        torch.save(_rng_state(), file)
        file.flush()
        os.fsync(file.fileno())
    if dist.get_world_size() > 1:
        dist.barrier()


def load(directory: Path, chunks: list[Any], optimizer: Any, schedule: Any) -> bool:
    """Read weights, optimizer and schedule; the layout may differ from the writer's.

    Returns whether the random state was restored too, which needs as many ranks as wrote it.
    """
    if not (directory / "metadata.json").is_file():
        raise UserError(f"checkpoint {directory} has no metadata.json: it is not a complete checkpoint")
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()  # something to load into; all is overwritten
    state = dist_checkpointing.load(_sharded_state(chunks, optimizer, is_loading=True), str(directory))
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(state[key], strict=False)
        wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        assert not wrong, f"checkpoint and model disagree on {wrong}"
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    same_ranks = not _rng_file(directory, dist.get_world_size()).exists()
    file = _rng_file(directory, dist.get_rank())
    if same_ranks and file.exists():
        _set_rng_state(torch.load(file, weights_only=False))
        return True
    return False


def _sharded_state(chunks: list[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron writes process groups into it
    state: dict[str, Any] = {
        key: chunk.sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True)
    }
    if optimizer is not None:
        model = state["model"] if len(chunks) == 1 else dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return state


def _chunk_keys(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _rng_file(directory: Path, rank: int) -> Path:
    return directory / f"rng_{rank:05}.pt"


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),  # noqa: NPY002  what libraries draw from
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
