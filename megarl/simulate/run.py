"""Compute all figures of a plan."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from megarl.config.hub import directory_of
from megarl.config.parallel import ParallelConfig
from megarl.config.plan import PlanConfig
from megarl.config.rollout import EngineConfig
from megarl.layout import RankCoordinates
from megarl.models import load_architecture
from megarl.models.lora import check_lora
from megarl.models.spec import ModelSpec
from megarl.simulate import fsdp, memory, transfer
from megarl.simulate.layouts import Layouts, build_layouts
from megarl.simulate.shapes import active_elements, hf_elements, stage_shapes


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Traffic of a weight sync, lower bounds of its duration, and the cost of gathering instead."""

    traffic: transfer.Traffic
    seconds: transfer.Seconds
    gathering: transfer.Gathering


@dataclass(frozen=True, slots=True)
class Simulation:
    """Result of `megarl plan`. ``gpus`` is by GPU, the trainer's first; other lists are by engine rank."""

    config: PlanConfig
    layouts: Layouts
    spec: ModelSpec
    num_parameters: int
    num_active_parameters: int
    gpus: list[memory.GpuMemory]
    kv_bytes_per_token: int
    engine_bytes: list[int]  # parameters per engine rank, in bytes
    weight_sync: WeightSync | None  # None without engines
    collectives: fsdp.Collectives | None  # of the torch backend
    notes: list[str]
    seconds: float  # duration of planning

    @property
    def offload(self) -> list[str]:
        """Return what is freed while engines generate; the torch backend keeps no gradients between steps."""
        gone = ["gradients"] if self.config.trainer.backend == "torch" else []
        return [*self.config.weights.offload, *gone]

    def peak(self, gpu: memory.GpuMemory) -> int:
        """Return the peak bytes of a GPU, without reserved memory."""
        offload = self.offload
        return max(memory.while_training(gpu, offload).total, memory.while_generating(gpu, offload).total)

    @property
    def fullest(self) -> dict[str, int]:
        """The fullest GPU of each kind: "GPU", or "trainer GPU" and "engine GPU"."""
        first = self.layouts.trainer.world_size
        kinds = {"GPU": range(len(self.gpus))}
        if not self.layouts.colocated:
            kinds = {"trainer GPU": range(first), "engine GPU": range(first, len(self.gpus))}
        return {kind: max(those, key=lambda n: self.peak(self.gpus[n])) for kind, those in kinds.items()}

    @property
    def free_bytes(self) -> int:
        """Free bytes on the fullest GPU after reserved memory; negative if the plan does not fit."""
        gpu = self.config.gpu
        peak = max(self.peak(self.gpus[n]) for n in self.fullest.values())
        return int((gpu.memory_gib - gpu.reserved_gib) * memory.GIB) - peak

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain data; sizes in bytes, times in seconds."""
        return {
            "config": self.config.model_dump(),
            "model": {
                "family": self.spec.family,
                "parameters": self.num_parameters,
                "active_parameters": self.num_active_parameters,
            },
            "trainer": asdict(self.layouts.trainer),
            "engine": asdict(self.layouts.engine) | {"num_engines": self.layouts.num_engines},
            "fits": self.free_bytes >= 0,
            "free_bytes": self.free_bytes,
            "fullest": self.fullest,
            "memory": [asdict(gpu) | {"peak": self.peak(gpu)} for gpu in self.gpus],
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "engine_bytes": self.engine_bytes,
            **self._weight_sync_as_json(),
            "collectives": None if self.collectives is None else asdict(self.collectives),
            "notes": self.notes,
            "seconds": self.seconds,
        }

    def _weight_sync_as_json(self) -> dict[str, Any]:
        if (sync := self.weight_sync) is None:
            return {}
        return {
            "transfer": asdict(sync.traffic),
            "transfer_seconds": asdict(sync.seconds) | {"bound": sync.seconds.bound},
            "gathering": asdict(sync.gathering),
        }


def simulate(config: PlanConfig, gpus: int) -> Simulation:
    """Plan ``config`` on ``gpus`` trainer GPUs.

    Raises:
        UserError: a model without a table, or every violation of the two layouts.
    """
    start = time.perf_counter()
    architecture = load_architecture(directory_of(config.model.path))
    check_lora(architecture, config.trainer.lora, "trainer.lora")
    spec = architecture.spec
    layouts = build_layouts(config, architecture, gpus)
    trainer = layouts.trainer
    stages = [
        stage_shapes(architecture, "trainer", trainer, RankCoordinates(pipeline=stage))
        for stage in range(trainer.pipeline)
    ]
    by_torch = config.trainer.backend == "torch"
    if by_torch:
        by_stage = [fsdp.rank_memory(config, architecture, layouts)]
    else:
        by_stage = [
            memory.trainer_memory(config, architecture, layouts, stage, shapes)
            for stage, shapes in enumerate(stages)
        ]
    engine_bytes, own, weight_sync, kv_bytes = list[int](), list[int](), None, 0
    if config.engine is not None:
        if by_torch and fsdp.is_sharded(config, trainer):
            owners = fsdp.owners_of(config, architecture, layouts)
        else:  # one data-parallel rank has its parameters as engines fuse them, with either backend
            owners = transfer.trainer_owners(config, architecture, layouts, stages)
        ranks = transfer.EngineRanks(config, architecture, layouts)
        traffic = transfer.plan_traffic(owners, ranks, layouts.engine_gpus)
        engine_bytes = [ranks.num_bytes(rank) for rank in range(layouts.engine_gpus)]
        own = [size - aliased for size, aliased in zip(engine_bytes, traffic.aliased, strict=True)]
        weight_sync = WeightSync(
            traffic,
            transfer.plan_seconds(config.gpu, traffic),
            transfer.gathering(config, architecture, owners, engine_bytes),
        )
        kv_bytes = memory.kv_bytes_per_token(config, spec, layouts)
    return Simulation(
        config=config,
        layouts=layouts,
        spec=spec,
        num_parameters=hf_elements(architecture),
        num_active_parameters=active_elements(architecture),
        gpus=memory.all_gpus(config, spec, layouts, by_stage, own),
        kv_bytes_per_token=kv_bytes,
        engine_bytes=engine_bytes,
        weight_sync=weight_sync,
        collectives=fsdp.collectives(config, architecture, layouts) if by_torch else None,
        notes=_notes(config, spec),
        seconds=time.perf_counter() - start,
    )


def _notes(config: PlanConfig, spec: ModelSpec) -> list[str]:
    """Return notes on settings of the plan that a MegaRL run does not support."""
    notes, asked = [], config.trainer
    if spec.not_trainable and asked.backend == "megatron":
        notes.append(f"the trainer cannot build {spec.family} yet: {spec.not_trainable}")
    if asked.backend == "torch" and asked.activation_recompute != "full":
        notes.append("activations are those of MegaRL's layers; transformers' keep some more")
    wanted = {
        "expert_tensor_parallel_size": asked.expert_tensor_parallel_size > 1,
        "first_stage_layers": asked.first_stage_layers is not None,
        "last_stage_layers": asked.last_stage_layers is not None,
        "activation_recompute": asked.activation_recompute != "off",
    }
    if lacking := [name for name, want in wanted.items() if want and name not in ParallelConfig.model_fields]:
        notes.append(f"the trainer has no {', '.join(lacking)} yet")
    if config.engine is None:
        return notes
    wanted = {
        "pipeline_parallel_size": config.engine.pipeline_parallel_size > 1,
        "expert_parallel": config.engine.expert_parallel,
    }
    lacking = [name for name, want in wanted.items() if want and name not in EngineConfig.model_fields]
    if config.engine.data_parallel_size > 1:  # in a run this field means engine replicas
        lacking.append("data_parallel_size that splits experts (in a run it means engine replicas)")
    if lacking:
        notes.append(f"MegaRL's engines have no {', '.join(lacking)} yet")
    return notes
