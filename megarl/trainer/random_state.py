"""A rank's random states in a checkpoint: one file per rank, for exact resumes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from megarl import platform
from megarl.errors import UserError
from megarl.terminal import one_line

# Older checkpoints have numpy's own state, with an array that is rebuilt from its bytes.
_NUMPY: list[Any] = [
    numpy._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype("uint32")),
]


def file(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return directory / f"rng_{rank:05}.pt"


def read(directory: Path, rank: int, num_ranks: int) -> dict[str, Any] | None:
    """Return the states of ``rank``; None unless exactly ``num_ranks`` ranks wrote the checkpoint.

    Only tensors, numbers and strings are unpickled.

    Raises:
        UserError: the file is damaged, or contains anything else.
    """
    own = file(directory, rank)
    if file(directory, num_ranks).exists() or not own.exists():
        return None
    try:
        with torch.serialization.safe_globals(_NUMPY):
            found: dict[str, Any] = torch.load(own, weights_only=True)
    except Exception as error:  # torch's reader and its unpickler raise many types
        raise UserError(f"{own}: damaged, or not a random state: {one_line(str(error))[:200]}") from error
    return found


def take() -> dict[str, Any]:
    """Return the current states."""
    name, keys, *rest = numpy.random.get_state(legacy=True)  # noqa: NPY002  used by libraries
    state = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if platform.current().name == "cuda":  # otherwise it is the CPU's
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def put(state: dict[str, Any]) -> bool:
    """Restore these random states; False for a GPU's generators on a CPU or the reverse."""
    if ("cuda" in state) != (platform.current().name == "cuda"):
        return False
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.asarray(keys).astype("uint32"), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return True
