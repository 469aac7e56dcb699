"""Initialise one rank's process groups and random state."""

from __future__ import annotations

import os
import random
import warnings
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megarl import platform
from megarl.cluster import collectives
from megarl.config.parallel import ParallelConfig
from megarl.layout import ParallelLayout
from megarl.trainer.interface import RankContext


def initialize(parallel: ParallelConfig, seed: int) -> RankContext:
    """Install the platform, join the process group (RANK, WORLD_SIZE, MASTER_ADDR from the
    launcher; a single process without one) and build Megatron's groups."""
    # megatron-core warns at import about each missing optional package; `megarl doctor` lists them.
    known = ("Transformer Engine", "Apex", "full scope is deprecated", "is experimental and still under")
    warnings.filterwarnings("ignore", message=f".*({'|'.join(known)}).*")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # it is the right one
    chosen = platform.install()
    from megatron.core import parallel_state, tensor_parallel

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    layout = ParallelLayout.from_world_size(
        world_size,
        tensor=parallel.tensor_parallel_size,
        pipeline=parallel.pipeline_parallel_size,
        context=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        virtual=parallel.virtual_pipeline_parallel_size,
        expert=parallel.expert_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )
    timeout = timedelta(minutes=60)  # of a step's collectives; rollouts are awaited on the control group
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(chosen.backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(chosen.backend, rank=rank, world_size=world_size, timeout=timeout)
    collectives.join()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002  used by libraries
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    here = parallel.model_copy(update={"num_processes": world_size})
    return RankContext(rank, layout, layout.coordinates(rank), chosen, here, seed)


def finalize() -> None:
    """Destroy the process groups."""
    from megatron.core import parallel_state

    collectives.leave()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
