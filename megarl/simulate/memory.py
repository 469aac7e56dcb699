"""Memory per GPU of trainer and engine."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from megarl.config.plan import PlanConfig
from megarl.layout import RankCoordinates
from megarl.models.lora import local_elements
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture
from megarl.simulate.activations import Microbatch, stage_bytes
from megarl.simulate.layouts import Layouts
from megarl.simulate.shapes import ITEM_BYTES, ParamShape, num_elements

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on one GPU. ``engine_parameters`` excludes aliased ones, which are the trainer's memory.

    ``merged`` is the trainer's copy of LoRA layers with merged adapters, which engines read; ``gathered`` are
    weights that FSDP holds whole during a pass.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    merged: int = 0
    gathered: int = 0
    activations: int = 0
    engine_parameters: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        trainer = self.parameters + self.gradients + self.optimizer + self.reference + self.merged
        return trainer + self.gathered + self.activations + self.engine_parameters + self.kv_cache


def while_training(memory: GpuMemory, offload: Collection[str]) -> GpuMemory:
    """Return the memory during training."""
    return replace(memory, kv_cache=0) if "kv_cache" in offload else memory


def while_generating(memory: GpuMemory, offload: Collection[str]) -> GpuMemory:
    """Return the memory during generation: without what a pass needs, and without offloaded parts."""
    away = {part: 0 for part in ("gradients", "optimizer") if part in offload}
    return replace(memory, activations=0, gathered=0, **away)


def trainer_memory(
    config: PlanConfig,
    architecture: Architecture,
    layouts: Layouts,
    stage: int,
    shapes: dict[str, ParamShape],
) -> GpuMemory:
    """Return the trainer's memory on each rank of a pipeline stage.

    Gradients are not sharded. The optimizer has, per parameter, a float32 master copy (unless the parameter
    is float32) and two moments; the distributed optimizer shards them over the ranks with the same
    parameters: data x context ranks for dense ones, fewer for experts (Rajbhandari et al. 2019,
    arXiv:1910.02054, stage 1). With LoRA only adapters have gradients and optimizer state.
    """
    spec = architecture.spec
    layout, dtypes = layouts.trainer, config.dtypes
    dense, experts = num_elements(shapes, expert=False), num_elements(shapes, expert=True)
    replicas = layout.data * layout.context, layout.stage_size // (layout.expert * layout.expert_tensor)
    if not config.trainer.distributed_optimizer:
        replicas = 1, 1
    trained, adapted = (dense, experts), 0
    if (lora := config.trainer.lora) is not None:
        regions = architecture.trainer_regions(layout, RankCoordinates(pipeline=stage))
        adapters, adapted = local_elements(architecture, lora, regions)
        trained = adapters, 0
    kept = sum(math.ceil(count / ranks) for count, ranks in zip(trained, replicas, strict=True))
    master = 0 if dtypes.parameters == "float32" else ITEM_BYTES["float32"]
    item = ITEM_BYTES[dtypes.parameters]
    batch = Microbatch(config.workload.tokens_per_microbatch / layout.context, item)
    activations = stage_bytes(
        spec,
        layout,
        stage,
        batch,
        recompute=config.trainer.activation_recompute,
        num_microbatches=config.trainer.num_microbatches,
    )
    return GpuMemory(
        parameters=(dense + experts) * item + (sum(trained) * item if lora is not None else 0),
        gradients=sum(trained) * ITEM_BYTES[dtypes.gradients],
        optimizer=kept * (master + 2 * ITEM_BYTES[dtypes.moments]),
        reference=(dense + experts) * item if config.trainer.keep_reference and lora is None else 0,
        merged=adapted * item,
        activations=math.ceil(activations),
    )


def kv_bytes_per_token(config: PlanConfig, spec: ModelSpec, layouts: Layouts) -> int:
    """Return the KV-cache bytes per token on the engine GPU with the most layers.

    Keys and values of this rank's KV heads (at least one); for latent attention the latent and the rotary
    part of k, on every tensor rank (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).
    """
    engine = layouts.engine
    layers = max(len(engine.stage_layers(spec.num_layers, stage)) for stage in range(engine.pipeline))
    if spec.mla is not None:
        elements = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    else:
        elements = 2 * max(spec.num_kv_heads // engine.tensor, 1) * spec.head_dim
    return layers * elements * ITEM_BYTES[config.dtypes.kv_cache]


def kv_cache_bytes(config: PlanConfig, spec: ModelSpec, layouts: Layouts) -> int:
    """Return the KV-cache bytes of one engine GPU."""
    engine = config.engine
    assert engine is not None
    if engine.kv_cache_gib is not None:
        return int(engine.kv_cache_gib * GIB)
    assert engine.max_num_seqs is not None
    tokens = engine.max_num_seqs * config.workload.sequence_length
    return tokens * kv_bytes_per_token(config, spec, layouts)


def all_gpus(
    config: PlanConfig,
    spec: ModelSpec,
    layouts: Layouts,
    by_stage: list[GpuMemory],
    engine_bytes: list[int],
) -> list[GpuMemory]:
    """Return the memory of every GPU, those of the trainer first.

    Args:
        config: the plan.
        spec: the model.
        layouts: of trainer and engine.
        by_stage: the trainer's memory on each rank of a pipeline stage.
        engine_bytes: bytes of parameters that are not aliased, per engine rank; [] without engines.
    """
    trainer = layouts.trainer
    gpus = [by_stage[trainer.coordinates(rank).pipeline] for rank in range(trainer.world_size)]
    if config.engine is None:
        return gpus
    cache = kv_cache_bytes(config, spec, layouts)
    if not layouts.colocated:
        return gpus + [GpuMemory(engine_parameters=own, kv_cache=cache) for own in engine_bytes]
    return [
        replace(gpu, engine_parameters=own, kv_cache=cache)
        for gpu, own in zip(gpus, engine_bytes, strict=True)
    ]
