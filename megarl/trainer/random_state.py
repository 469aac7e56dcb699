"""A rank's random states in a checkpoint: a file of its own, for runs that go on exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from megarl import platform


def file(directory: Path, rank: int) -> Path:
    """A rank's."""
    return directory / f"rng_{rank:05}.pt"


def read(directory: Path, rank: int, num_ranks: int) -> dict[str, Any] | None:
    """What ``rank`` wrote; None where fewer or more than ``num_ranks`` ranks wrote the checkpoint."""
    own = file(directory, rank)
    if file(directory, num_ranks).exists() or not own.exists():
        return None
    found: dict[str, Any] = torch.load(own, weights_only=False)
    return found


def take() -> dict[str, Any]:
    """The states as they are."""
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),  # noqa: NPY002  what libraries draw from
        "torch": torch.get_rng_state(),
    }
    if platform.current().name == "cuda":  # elsewhere it is the CPU's
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def put(state: dict[str, Any]) -> bool:
    """Go on with these random states; whether that is possible: a GPU's generators are not a CPU's."""
    if ("cuda" in state) != (platform.current().name == "cuda"):
        return False
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return True
