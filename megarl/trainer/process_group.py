"""Join the process group and seed the random state of one rank, for any backend."""

from __future__ import annotations

import os
import random
import warnings
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megarl.cluster import collectives
from megarl.cluster.rendezvous import open_store
from megarl.config.parallel import ParallelConfig
from megarl.layout import ParallelLayout
from megarl.models.layout_checks import layout_of
from megarl.platform import Platform


def layout_of_ranks(parallel: ParallelConfig) -> ParallelLayout:
    """Return the layout of the ranks started by the launcher (WORLD_SIZE; one rank without it)."""
    return layout_of(parallel, int(os.environ.get("WORLD_SIZE", "1")))


def join(platform: Platform) -> int:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR) and the control group; return this rank."""
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # it is the right one
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = timedelta(minutes=60)  # of a step's collectives; rollouts are awaited on the control group
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        store = open_store(rank, world_size, timeout)
        dist.init_process_group(
            platform.backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    collectives.join()
    return rank


def seed_all(seed: int) -> None:
    """Seed all generators of this process."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002  used by libraries
    torch.manual_seed(seed)


def leave() -> None:
    """Destroy the control group and the process group."""
    collectives.leave()
    dist.destroy_process_group()
