"""Settings of `megarl plan`: a model, the layouts of trainer and engine, and the GPUs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.dtypes import IS_DTYPE, Dtype
from megarl.config.hub import ModelPath
from megarl.config.lora import LoraLayers
from megarl.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class PlanModelConfig(Section):
    """The model."""

    path: ModelPath
    """Directory with a Hugging Face config.json, or a hub id; weights are not needed."""


class PlanTrainerConfig(Section):
    """Parallel layout of the trainer on --gpus GPUs; data parallelism takes the rest."""

    backend: Literal["megatron", "torch"] = "megatron"
    """As trainer.backend of a run. torch has tensor and data parallelism (FSDP) alone."""
    replicate_size: PositiveInt = 1
    """torch: copies of the model among data-parallel ranks (HSDP), each sharded over its part of them."""
    reshard_after_forward: bool = True
    """torch: drop a layer's gathered weights after its forward pass and gather them again in the backward."""
    reduce_each_microbatch: bool = False
    """torch: reduce gradients after each microbatch, not once a step."""
    cpu_offload: bool = False
    """torch: parameters, reduced gradients and optimizer in host memory."""
    tensor_parallel_size: PositiveInt = 1
    """Tensor parallelism: ranks that shard each layer's matrices."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over TP ranks; needs tensor_parallel_size > 1."""
    pipeline_parallel_size: PositiveInt = 1
    """Pipeline parallelism: stages of layers."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved schedule); needs pipeline_parallel_size > 1."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage; null: as many as the others."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage; null: as many as the others."""
    context_parallel_size: PositiveInt = 1
    """Context parallelism: ranks that split each sequence."""
    expert_parallel_size: PositiveInt = 1
    """Expert parallelism: ranks of a pipeline stage that split each layer's experts."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks of a pipeline stage that shard each expert's matrices."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    activation_recompute: Literal["off", "selective", "full"] = "off"
    """Recompute in the backward pass: attention (selective) or whole layers (full)."""
    keep_reference: bool = False
    """Count a frozen copy of the parameters for reference logprobs (grpo with algorithm.kl_coef > 0, dpo)."""
    lora: LoraLayers | None = None
    """Train LoRA adapters on frozen parameters; the reference then needs no copy."""
    num_microbatches: PositiveInt | None = None
    """Microbatches per optimizer step and data-parallel rank; null: enough to fill the pipeline."""


class PlanEngineConfig(Section):
    """Layout of the vLLM engines; as many engines as the GPUs hold."""

    colocated: bool = True
    """Engines share the trainer's GPUs; false: they use num_gpus other GPUs."""
    num_gpus: PositiveInt | None = None
    """GPUs of the engines, with colocated: false."""
    tensor_parallel_size: PositiveInt = 1
    """Tensor parallelism: ranks that shard each layer's matrices."""
    pipeline_parallel_size: PositiveInt = 1
    """Pipeline parallelism: stages of layers, split as vLLM splits them."""
    data_parallel_size: PositiveInt = 1
    """vLLM's data parallelism: groups of tensor ranks that replicate attention and split experts."""
    expert_parallel: bool = False
    """Each of the TP x DP ranks holds whole experts (vLLM's enable_expert_parallel), not shards of all."""
    kv_cache_gib: PositiveFloat | None = None
    """KV cache per GPU; give this or max_num_seqs."""
    max_num_seqs: PositiveInt | None = None
    """Size the KV cache for this many sequences of workload.sequence_length, per data-parallel rank."""


class PlanWeightsConfig(Section):
    """Memory offload of colocated engines."""

    offload: list[Literal["gradients", "optimizer", "kv_cache"]] = Field(default_factory=list)
    """Memory to free while the other side works, as weights.offload of grpo; needs colocated: true."""


class PlanWorkloadConfig(Section):
    """Sequence lengths."""

    sequence_length: PositiveInt
    """Longest prompt + response in tokens."""
    tokens_per_microbatch: PositiveInt
    """Packed tokens of one microbatch, over all its context-parallel ranks."""


class PlanDtypesConfig(Section):
    """Stored dtypes. The optimizer's master parameters are float32."""

    parameters: Dtype = "bfloat16"
    """Parameters and activations of the trainer; float32 parameters need no master copy."""
    gradients: Dtype = "float32"
    """Gradients, accumulated over microbatches."""
    moments: Dtype = "float32"
    """Adam's two moments."""
    engine: Dtype = "bfloat16"
    """Parameters of the engine; aliasing needs the trainer's dtype."""
    kv_cache: Annotated[Literal["float32", "bfloat16", "float8"], IS_DTYPE] = "bfloat16"
    """KV cache."""


class PlanGpuConfig(Section):
    """Memory and bandwidths of a GPU. GB = 10^9 bytes, GiB = 2^30; bandwidths are per direction."""

    memory_gib: PositiveFloat = 80
    """Memory of one GPU."""
    reserved_gib: NonNegativeFloat = 6
    """Part of it reserved for CUDA, NCCL, the engine's activations and fragmentation."""
    gpus_per_host: PositiveInt = 8
    """GPUs connected by NVLink; others are connected by the network."""
    memory_gb_s: PositiveFloat = 3350
    """Memory bandwidth; a copy within a GPU counts twice (read and write)."""
    nvlink_gb_s: PositiveFloat = 450
    """NVLink bandwidth of one GPU."""
    network_gb_s: PositiveFloat = 50
    """Network bandwidth of one GPU."""


class PlanConfig(Section):
    """Root of `megarl plan`."""

    model: PlanModelConfig
    trainer: PlanTrainerConfig
    engine: PlanEngineConfig | None = None
    """Layout of the engines; null: a run without (sft, dpo, rm)."""
    workload: PlanWorkloadConfig
    weights: PlanWeightsConfig = PlanWeightsConfig()
    dtypes: PlanDtypesConfig = PlanDtypesConfig()
    gpu: PlanGpuConfig = PlanGpuConfig()
