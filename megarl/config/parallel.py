"""How the trainer is split over processes, and what it trades for memory or overlap."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """How the trainer is split over processes. data_parallel_size is what remains."""

    num_processes: PositiveInt = 1
    """Trainer ranks `megarl` starts on this machine; under torchrun or srun WORLD_SIZE replaces it."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the stack of layers."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    """How context-parallel ranks see each other's keys: gathered a layer at a time, or passed around in
    Transformer Engine's ring (GPUs with that package; without shared prefixes or latent attention)."""
    context_split_from: PositiveInt | None = None
    """Split only sequences of at least this many tokens over the context-parallel ranks; one of them computes
    a shorter one whole. Needs context_parallel_size > 1; null splits all."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the tensor-parallel ranks; needs tensor_parallel_size > 1."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline_parallel_size > 1."""
    expert_parallel_size: PositiveInt = 1
    """Ranks of a pipeline stage that share each layer's experts, whole experts each."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share each expert's matrices; experts are not split by tensor_parallel_size."""
    expert_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: each to its ranks, or all to all ranks (for few, large groups)."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which also has the embedding; null: as many as the others."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which also has the head; null: as many as the others."""
    activation_recompute: Literal["off", "selective", "full"] = "off"
    """Compute again in the backward pass, instead of keeping: the attention (selective), or whole layers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass; needs optimizer.distributed. Not for grpo."""
