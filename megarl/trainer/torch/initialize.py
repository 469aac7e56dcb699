"""One rank's process group and random state under the torch backend."""

from __future__ import annotations

from megarl import platform
from megarl.config.parallel import ParallelConfig
from megarl.config.trainer import TrainerConfig
from megarl.trainer import process_group
from megarl.trainer.interface import RankContext


def initialize(parallel: ParallelConfig, seed: int, trainer: TrainerConfig) -> RankContext:
    """Install the platform, without Megatron, and join the process group."""
    chosen = platform.install(megatron=False)
    layout = process_group.layout_of_ranks(parallel)
    rank = process_group.join(chosen)
    process_group.seed_all(seed)
    here = parallel.model_copy(update={"num_processes": layout.world_size})
    return RankContext(rank, layout, layout.coordinates(rank), chosen, here, seed, trainer)


def finalize() -> None:
    """Leave the process group."""
    process_group.leave()
