"""Select and load the checkpoint to resume from: the newest undamaged one.

All functions are collective. A damaged checkpoint is renamed, with a warning that names its file, and the one
before it is used; if all are damaged, the run stops with an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megarl.cluster.collectives import from_first_rank, gather, on_first_rank
from megarl.errors import ToldByRankZeroError, UserError, see
from megarl.metrics.console import Console
from megarl.run_directory import RunDirectory
from megarl.runs.checkpoint_manager import STATE_FILE, read_state
from megarl.trainer.checksums import damage, is_sealed
from megarl.trainer.interface import Checkpointable


def newest_whole(directory: RunDirectory, console: Console) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its loop state; None without checkpoints.

    Raises:
        UserError: all checkpoints are damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(from_first_rank(directory.checkpoint_steps)):
        path = directory.checkpoint_path(step)
        shares = gather(damage(path, dist.get_rank(), dist.get_world_size()))
        found, state = (
            [each for share in shares for each in share],
            from_first_rank(partial(read_state, path)),
        )
        if not found and state.get("step") != step:
            found = [f"{STATE_FILE} does not say what step {step} ended with"]
        if not found:
            on_first_rank(partial(_set_aside, directory, console, damaged, path))
            return path, state
        damaged[step] = found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "")
    if damaged:
        said = "; ".join(f"step_{step}: {why}" for step, why in damaged.items())
        raise told_once(
            f"run.dir: no checkpoint in {directory.checkpoints_path} is whole ({said}): restore one, or "
            "choose another run.dir"
        )
    return None


def _set_aside(directory: RunDirectory, console: Console, damaged: Mapping[int, str], path: Path) -> None:
    for step, why in damaged.items():
        kept = directory.set_aside(step)
        console.warn(
            f"checkpoint step_{step} is damaged ({why}): kept as {kept.name}, going on from {path.name}"
        )


def load(policy: Checkpointable, path: Path, state: Mapping[str, Any], num_steps: int) -> bool:
    """Load a checkpoint returned by :func:`newest_whole`; return whether random states were restored.

    Raises:
        UserError: it has no optimizer state but steps remain, or it cannot be read.
    """
    if not state.get("optimizer", True):
        if state["step"] < num_steps:
            raise told_once(
                f"checkpoint {path} was saved without its optimizer (checkpoint.save_optimizer: false): the "
                "run cannot go on from it. Begin another run.dir with model.path on its weights, which "
                f"`megarl convert megatron-to-hf {path} DIR` writes"
            )
        return policy.load(path, optimizer=False)
    if is_sealed(path):
        return policy.load(path)
    try:
        return policy.load(path)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # from before checksums: nobody has looked at it yet
        causes = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        cause = causes[0][0] if causes else error
        why = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        raise UserError(
            f"checkpoint {path} is damaged ({why}); delete it to go on from the one before{see('damaged-checkpoint')}"
        ) from error


def told_once(line: str) -> UserError:
    """Return an error that all ranks raise and only rank 0 prints."""
    return UserError(line) if dist.get_rank() == 0 else ToldByRankZeroError(line)
