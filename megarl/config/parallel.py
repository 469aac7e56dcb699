"""Parallel layout of the trainer, activation recompute and overlap."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Problems, ProcessCount, Section, rule


class ParallelConfig(Section):
    """Parallel layout of the trainer. data_parallel_size is num_processes / (TP x PP x CP)."""

    num_processes: ProcessCount = 1
    """Trainer ranks that `megarl` starts here; ignored under torchrun and srun, which set WORLD_SIZE."""
    tensor_parallel_size: ProcessCount = 1
    """Tensor parallelism: ranks that shard each layer's matrices."""
    pipeline_parallel_size: ProcessCount = 1
    """Pipeline parallelism: stages of layers."""
    context_parallel_size: ProcessCount = 1
    """Context parallelism: ranks that split each sequence."""
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    """Attention over context-parallel ranks: all_gather of keys and values per layer, or Transformer Engine's
    ring (GPU, needs that package; no shared prefixes, no latent attention)."""
    context_split_from: PositiveInt | None = None
    """Split only sequences of at least this many tokens over the context-parallel ranks; a shorter one stays
    on one rank. Needs context_parallel_size > 1; null: split all."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over TP ranks; needs tensor_parallel_size > 1."""
    virtual_pipeline_parallel_size: ProcessCount = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline_parallel_size > 1."""
    expert_parallel_size: ProcessCount = 1
    """Expert parallelism: ranks of a pipeline stage that split each layer's experts."""
    expert_tensor_parallel_size: ProcessCount = 1
    """Ranks that shard each expert's matrices; tensor_parallel_size does not shard experts."""
    expert_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """Token dispatch: all-to-all to the experts' ranks, or all-gather to all ranks (few, large groups)."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which also holds the embedding; null: as many as the others."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which also holds the head; null: as many as the others."""
    activation_recompute: Literal["off", "selective", "full"] = "off"
    """Recompute in the backward pass: attention (selective) or whole layers (full)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass. Needs optimizer.distributed; not for online
    runs."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks per model replica: TP x PP x CP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Model replicas, each with its own sequences."""
        return self.num_processes // self.model_parallel_size

    @rule
    def _sizes(self) -> Problems:
        """`num_processes` is a multiple of `tensor_parallel_size` x `pipeline_parallel_size` x
        `context_parallel_size`."""
        product = self.model_parallel_size
        if self.num_processes % product:
            sizes = "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"
            reason = f"must be a multiple of {' * '.join(sizes)} = {product} (got {self.num_processes})"
            yield "num_processes", reason, *sizes

    @rule
    def _of_several_ranks(self) -> Problems:
        """`sequence_parallel` needs `tensor_parallel_size` > 1, `virtual_pipeline_parallel_size` needs
        `pipeline_parallel_size` > 1, `context_attention` and `context_split_from` need
        `context_parallel_size` > 1."""
        for size, names in (
            ("tensor_parallel_size", ["sequence_parallel"]),
            ("pipeline_parallel_size", ["virtual_pipeline_parallel_size"]),
            ("context_parallel_size", ["context_attention", "context_split_from"]),
        ):
            for name, value in self.changed(*names) if getattr(self, size, None) == 1 else ():
                needs = "ring needs" if value == "ring" else "needs"
                yield name, f"{needs} parallel.{size} > 1 (got {size} 1)", size

    @rule
    def _uneven_stages(self) -> Problems:
        """`first_stage_layers` and `last_stage_layers` need `pipeline_parallel_size` > 1 and
        `virtual_pipeline_parallel_size: 1`."""
        if self.pipeline_parallel_size == 1 or self.virtual_pipeline_parallel_size > 1:
            needs = "pipeline_parallel_size", "virtual_pipeline_parallel_size"
            for name, _ in self.changed("first_stage_layers", "last_stage_layers"):
                yield name, f"needs parallel.{needs[0]} > 1 and {needs[1]} 1", *needs

    @rule
    def _overlap(self) -> Problems:
        """`overlap_param_gather` needs `overlap_grad_reduce`."""
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            reason = "needs parallel.overlap_grad_reduce = true (they share Megatron's hooks)"
            yield "overlap_param_gather", reason, "overlap_grad_reduce"

    @rule
    def _expert_parallel(self) -> Problems:
        """`expert_parallel_size` x `expert_tensor_parallel_size` divides the ranks of a pipeline stage."""
        stage, rest = divmod(self.num_processes, self.pipeline_parallel_size)
        size, split = self.expert_parallel_size, self.expert_tensor_parallel_size
        if not rest and stage % (size * split):
            times = f"times expert_tensor_parallel_size = {split} " if split > 1 else ""
            reason = f"{times}must divide the {stage} ranks of a pipeline stage (got {size})"
            yield "expert_parallel_size", reason, "num_processes", "pipeline_parallel_size"
