"""Megatron distributed checkpoints of weights, optimizer and schedule, and each rank's random state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megarl.errors import UserError
from megarl.trainer import random_state
from megarl.trainer.checkpoint_files import PendingSave
from megarl.trainer.checkpoint_metadata import read_metadata
from megarl.trainer.megatron.checkpoint_files import rank_files
from megarl.trainer.megatron.lora import SUFFIX as ADAPTER_SUFFIX
from megarl.trainer.megatron.optimizer_shards import OptimizerShards, distributed_parts, read_whole

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(directory: Path, chunks: list[Any], optimizer: Any | None, schedule: Any) -> None:
    """Write into ``directory`` (existing, empty). It is complete when the call returns on all ranks."""
    start_save(directory, chunks, optimizer, schedule, background=False).finish()


def start_save(
    directory: Path, chunks: list[Any], optimizer: Any | None, schedule: Any, *, background: bool = True
) -> PendingSave:
    """Begin to write into ``directory`` (existing, empty); every rank then calls ``finish`` of the result.

    With ``background``, the call returns once this rank's part is in host memory, and training can continue;
    otherwise once its files are written. One save at a time.
    """
    shards = OptimizerShards(optimizer)
    with shards.described():
        state = _sharded_state(chunks, optimizer, is_loading=False)
    state["schedule"] = schedule.state_dict()
    rank = dist.get_rank()
    random_file = {random_state.file(directory, rank).name: _rng_state()}
    files = rank_files(directory, state, rank, random_file, shards)
    if background:
        files.detach()
    return PendingSave(files, background=background)


def load(directory: Path, chunks: list[Any], optimizer: Any | None, schedule: Any) -> bool:
    """Read weights, optimizer and schedule; the layout may differ from the writer's.

    Without an ``optimizer`` its state is not read. Returns True if the random state was restored too, which
    needs as many ranks as wrote it, and the same kind of device.
    """
    if not (directory / "metadata.json").is_file():
        why = "it is not a complete checkpoint"
        if (directory / "trainer.json").is_file():
            why = "trainer.backend = torch wrote it; export it (megarl convert) to train its weights"
        raise UserError(f"checkpoint {directory} has no metadata.json: {why}")
    read_metadata(directory)  # which runs nothing; Megatron unpickles it again, and anything
    if optimizer is None:
        wanted = _sharded_state(chunks, None, is_loading=True)
    else:
        for part in distributed_parts(optimizer):
            if not part.optimizer.state:
                part._init_optimizer_states_with_dummy_values()  # allocate state to load into
        with read_whole(optimizer):
            wanted = _sharded_state(chunks, optimizer, is_loading=True)
    with warnings.catch_warnings():  # Megatron uses deprecated names of torch
        warnings.simplefilter("ignore")
        state = dist_checkpointing.load(wanted, str(directory))
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(state[key], strict=False)
        if any(_is_adapter_entry(name) for name in state[key]):
            missing = [name for name in missing if _is_adapter_entry(name)]
        wrong = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
        assert not wrong, f"checkpoint and model disagree on {wrong}"
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    _resume(schedule, state["schedule"])
    found = random_state.read(directory, dist.get_rank(), dist.get_world_size())
    return found is not None and _set_rng_state(found)


def _resume(schedule: Any, saved: dict[str, Any]) -> None:
    """Set the schedule to the saved step, with the form and length of this run's configuration: Megatron
    would restore them too, and a run extended to more steps would continue at the end of the old schedule."""
    schedule.num_steps = 0
    schedule.step(increment=int(saved["num_steps"]))


def _sharded_state(chunks: list[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron writes process groups into it
    state: dict[str, Any] = {
        key: _saved_entries(chunk.sharded_state_dict(metadata=metadata))
        for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True)
    }
    if optimizer is not None:
        model = state["model"] if len(chunks) == 1 else dict(state)
        with _shared_step_count(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return state


_NO_PARAMETER = "no parameter"


@contextmanager
def _shared_step_count(optimizer: Any) -> Iterator[None]:
    """Give optimizer parts without a parameter on this rank the step count of the others.

    A pipeline stage without experts has an empty part for them, and a data-parallel rank may own nothing of a
    part. The count is a parameter's state in torch: without one, Megatron's distributed optimizer asserts,
    and the other writes no count for all ranks if rank 0 has none.
    """
    parts = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
    counts = [state["step"] for part in parts for state in part.state.values() if "step" in state]
    count = counts[0] if counts else torch.zeros(())
    empty = [part for part in parts if not any(group["params"] for group in part.param_groups)]
    for part in empty:
        part.state[_NO_PARAMETER] = {"step": count.clone()}
    try:
        yield
    finally:
        for part in empty:
            part.state.pop(_NO_PARAMETER, None)


def _saved_entries(state: dict[str, Any]) -> dict[str, Any]:
    """Select the saved entries: only the adapters if there are any, as model.path has the frozen weights."""
    return {name: part for name, part in state.items() if _is_adapter_entry(name)} or state


def _is_adapter_entry(name: str) -> bool:
    return f"{ADAPTER_SUFFIX}." in name


def _chunk_keys(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _rng_state() -> dict[str, Any]:
    return random_state.take() | {"tracker": get_cuda_rng_tracker().get_states()}


def _set_rng_state(state: dict[str, Any]) -> bool:
    """Restore these random states, if possible (random_state.put)."""
    if not random_state.put(state):
        return False
    get_cuda_rng_tracker().set_states(state["tracker"])
    return True
