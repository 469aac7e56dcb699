"""A rank's random states in a checkpoint: one file per rank, for exact resumes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from megarl import platform


def file(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return directory / f"rng_{rank:05}.pt"


def read(directory: Path, rank: int, num_ranks: int) -> dict[str, Any] | None:
    """Return the states of ``rank``; None unless exactly ``num_ranks`` ranks wrote the checkpoint."""
    own = file(directory, rank)
    if file(directory, num_ranks).exists() or not own.exists():
        return None
    found: dict[str, Any] = torch.load(own, weights_only=False)
    return found


def take() -> dict[str, Any]:
    """Return the current states."""
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),  # noqa: NPY002  used by libraries
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
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return True
