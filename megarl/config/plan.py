"""Settings of `megarl plan`: a model, two layouts and the machine, none of which need exist."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarl.config.lora import LoraLayers
from megarl.config.section import NonNegativeFloat, PathText, PositiveFloat, PositiveInt, Section


class PlanModelConfig(Section):
    """The model, by its shape alone."""

    path: PathText
    """Directory with a Hugging Face config.json; weights are not looked for."""


class PlanTrainerConfig(Section):
    """How the trainer is split over the GPUs of --gpus; data parallelism takes what remains."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split what tensor ranks would repeat along the tokens; needs tensor_parallel_size > 1."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the stack of layers."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline_parallel_size > 1."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage; null: as many as the others."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage; null: as many as the others."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    expert_parallel_size: PositiveInt = 1
    """Ranks of a pipeline stage that share each layer's experts, whole experts each."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks of a pipeline stage that share each expert's matrices."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    activation_recompute: Literal["off", "selective", "full"] = "off"
    """Compute again in the backward pass, instead of keeping: the attention (selective), or whole layers."""
    keep_reference: bool = False
    """Keep a frozen copy of the parameters for reference logprobs (algorithm.kl_coef > 0 in grpo, dpo)."""
    lora: LoraLayers | None = None
    """Train adapters of low rank beside frozen parameters; the reference then needs no copy."""
    num_microbatches: PositiveInt | None = None
    """Microbatches per optimizer step and data-parallel rank; null: enough to fill the pipeline."""


class PlanEngineConfig(Section):
    """How vLLM's engines are split; as many engines as the GPUs hold."""

    colocated: bool = True
    """The engines run on the trainer's GPUs; false: on GPUs of their own, as many as num_gpus."""
    num_gpus: PositiveInt | None = None
    """GPUs of the engines where they are not the trainer's."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the stack of layers, cut as vLLM cuts it."""
    data_parallel_size: PositiveInt = 1
    """Groups of tensor ranks that repeat attention and share experts (vLLM's data parallelism)."""
    expert_parallel: bool = False
    """Tensor x data ranks hold whole experts each (vLLM's enable_expert_parallel), not parts of all."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory for keys and values on each GPU; give this or max_num_seqs."""
    max_num_seqs: PositiveInt | None = None
    """Sequences of workload.sequence_length whose keys and values must fit, per data-parallel rank."""


class PlanWeightsConfig(Section):
    """What shares the memory of a GPU in turn."""

    offload: list[Literal["gradients", "optimizer", "kv_cache"]] = Field(default_factory=list)
    """What gives up its memory while the other side works, as weights.offload of grpo; needs colocated."""


class PlanWorkloadConfig(Section):
    """What is trained on and sampled."""

    sequence_length: PositiveInt
    """Longest prompt + response in tokens."""
    tokens_per_microbatch: PositiveInt
    """Packed tokens of one microbatch, over its context-parallel ranks."""


class PlanDtypesConfig(Section):
    """Types of what is stored. The optimizer's master parameters are float32."""

    parameters: Literal["float32", "bfloat16"] = "bfloat16"
    """Trainer's parameters and activations; float32 ones need no master copy."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Gradients as they are summed over microbatches."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Adam's two moments."""
    engine: Literal["float32", "bfloat16"] = "bfloat16"
    """Engine's parameters; only the trainer's type can be aliased."""
    kv_cache: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """Keys and values."""


class PlanGpuConfig(Section):
    """One GPU and what joins it to others. GB are 10^9 bytes, GiB 2^30; bandwidths count one direction."""

    memory_gib: PositiveFloat = 80
    """Memory of one GPU."""
    reserved_gib: NonNegativeFloat = 6
    """Of it, for what is not planned: CUDA and NCCL, the engine's activations, fragmentation."""
    gpus_per_host: PositiveInt = 8
    """GPUs that reach one another by NVLink; the rest is reached over the network."""
    memory_gb_s: PositiveFloat = 3350
    """Memory bandwidth; a copy within a GPU reads and writes."""
    nvlink_gb_s: PositiveFloat = 450
    """NVLink bandwidth of one GPU."""
    network_gb_s: PositiveFloat = 50
    """Network bandwidth of one GPU."""


class PlanConfig(Section):
    """Root of `megarl plan`."""

    model: PlanModelConfig
    trainer: PlanTrainerConfig
    engine: PlanEngineConfig
    workload: PlanWorkloadConfig
    weights: PlanWeightsConfig = PlanWeightsConfig()
    dtypes: PlanDtypesConfig = PlanDtypesConfig()
    gpu: PlanGpuConfig = PlanGpuConfig()
