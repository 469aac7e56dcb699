"""One rank's process groups and random state under Megatron."""

from __future__ import annotations

import warnings

from megarl import platform
from megarl.config.parallel import ParallelConfig
from megarl.config.trainer import TrainerConfig
from megarl.trainer import process_group
from megarl.trainer.interface import RankContext


def initialize(parallel: ParallelConfig, seed: int, trainer: TrainerConfig | None = None) -> RankContext:
    """Install the platform, join the process group (RANK, WORLD_SIZE, MASTER_ADDR from the
    launcher; a single process without one) and build Megatron's groups."""
    # megatron-core warns at import about each missing optional package; `megarl doctor` lists them.
    known = ("Transformer Engine", "Apex", "full scope is deprecated", "is experimental and still under")
    warnings.filterwarnings("ignore", message=f".*({'|'.join(known)}).*")
    chosen = platform.install()
    from megatron.core import parallel_state, tensor_parallel

    layout = process_group.layout_of_ranks(parallel)
    rank = process_group.join(chosen)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    process_group.seed_all(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    here = parallel.model_copy(update={"num_processes": layout.world_size})
    return RankContext(rank, layout, layout.coordinates(rank), chosen, here, seed, trainer or TrainerConfig())


def finalize() -> None:
    """Destroy the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    process_group.leave()
