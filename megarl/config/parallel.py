"""How the trainer is split over processes, and what it trades for memory or overlap."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Problems, ProcessCount, Section, rule


class ParallelConfig(Section):
    """How the trainer is split over processes. data_parallel_size is what remains."""

    num_processes: ProcessCount = 1
    """Trainer ranks `megarl` starts on this machine; under torchrun or srun WORLD_SIZE replaces it."""
    tensor_parallel_size: ProcessCount = 1
    """Ranks that share each layer's matrices."""
    pipeline_parallel_size: ProcessCount = 1
    """Ranks that share the stack of layers."""
    context_parallel_size: ProcessCount = 1
    """Ranks that share each sequence."""
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    """How context-parallel ranks see each other's keys: gathered a layer at a time, or passed around in
    Transformer Engine's ring (GPUs with that package; without shared prefixes or latent attention)."""
    context_split_from: PositiveInt | None = None
    """Split only sequences of at least this many tokens over the context-parallel ranks; one of them computes
    a shorter one whole. Needs context_parallel_size > 1; null splits all."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the tensor-parallel ranks; needs tensor_parallel_size > 1."""
    virtual_pipeline_parallel_size: ProcessCount = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline_parallel_size > 1."""
    expert_parallel_size: ProcessCount = 1
    """Ranks of a pipeline stage that share each layer's experts, whole experts each."""
    expert_tensor_parallel_size: ProcessCount = 1
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

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one copy of the model and one sequence."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different sequences."""
        return self.num_processes // self.model_parallel_size

    @rule
    def _sizes(self) -> Problems:
        product = self.model_parallel_size
        if self.num_processes % product:
            sizes = "tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"
            reason = f"must be a multiple of {' * '.join(sizes)} = {product} (got {self.num_processes})"
            yield "num_processes", reason, *sizes

    @rule
    def _of_several_ranks(self) -> Problems:
        """What needs another dimension of more than one rank."""
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
        if self.pipeline_parallel_size == 1 or self.virtual_pipeline_parallel_size > 1:
            needs = "pipeline_parallel_size", "virtual_pipeline_parallel_size"
            for name, _ in self.changed("first_stage_layers", "last_stage_layers"):
                yield name, f"needs parallel.{needs[0]} > 1 and {needs[1]} 1", *needs

    @rule
    def _overlap(self) -> Problems:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            reason = "needs parallel.overlap_grad_reduce = true (Megatron's hooks are the same)"
            yield "overlap_param_gather", reason, "overlap_grad_reduce"

    @rule
    def _expert_parallel(self) -> Problems:
        stage, rest = divmod(self.num_processes, self.pipeline_parallel_size)
        size, split = self.expert_parallel_size, self.expert_tensor_parallel_size
        if not rest and stage % (size * split):
            times = f"times expert_tensor_parallel_size = {split} " if split > 1 else ""
            reason = f"{times}must divide the {stage} ranks of a pipeline stage (got {size})"
            yield "expert_parallel_size", reason, "num_processes", "pipeline_parallel_size"
