"""The plan of a run: its configuration in the settings of `megarl plan`."""

from __future__ import annotations

from typing import Any

from megarl.config.lora import LoraLayers
from megarl.config.online import OnlineConfig
from megarl.config.plan import (
    PlanConfig,
    PlanDtypesConfig,
    PlanEngineConfig,
    PlanModelConfig,
    PlanTrainerConfig,
    PlanWeightsConfig,
    PlanWorkloadConfig,
)
from megarl.config.training import TrainingRoot


def plan_of(config: TrainingRoot, model_config: dict[str, Any]) -> PlanConfig:
    """Return the plan of a run whose model has this config.json.

    The run's engines share the trainer's GPUs; a run without engines has a plan without. A critic or teacher
    is not part of a plan (:func:`not_planned`).
    """
    parallel, engine, offload = config.parallel, None, []
    # Megatron's names are the plan's: what both have is taken over.
    layout = {name: getattr(parallel, name) for name in _layout_fields()}
    if isinstance(config, OnlineConfig):
        asked, offload = config.rollout.engine, list(config.weights.offload)
        engine = PlanEngineConfig(
            tensor_parallel_size=asked.tensor_parallel_size,
            expert_parallel=asked.expert_parallel,
            kv_cache_gib=float(asked.kv_cache_gib),
        )
    dtype = config.model.dtype
    engine_dtype = config.rollout.engine.dtype if isinstance(config, OnlineConfig) else "auto"
    return PlanConfig(
        model=PlanModelConfig(path=config.model.path),
        trainer=PlanTrainerConfig(
            **layout,
            **_of_backend(config),
            keep_reference=isinstance(config, OnlineConfig) and config.algorithm.needs_reference,
            lora=config.lora and LoraLayers(rank=config.lora.rank, target_modules=config.lora.target_modules),
        ),
        engine=engine,
        workload=PlanWorkloadConfig(
            sequence_length=config.max_sequence_length(model_config),
            tokens_per_microbatch=config.packing.max_tokens_per_microbatch,
        ),
        weights=PlanWeightsConfig(offload=offload),
        dtypes=PlanDtypesConfig(
            parameters=dtype,
            engine=dtype if engine_dtype == "auto" else engine_dtype,
            kv_cache=dtype if engine_dtype == "auto" else engine_dtype,
        ),
    )


def _of_backend(config: TrainingRoot) -> dict[str, Any]:
    """Return the plan's settings that one backend alone has."""
    if config.trainer.backend == "megatron":
        return {"distributed_optimizer": config.optimizer.distributed}
    return config.trainer.model_dump()


def not_planned(config: TrainingRoot) -> list[str]:
    """Return a line per part of the run that its plan does not count."""
    lines = []
    if (critic := getattr(config, "critic", None)) is not None:
        lines.append(f"not counted: the critic ({critic.path or config.model.path})")
    if (teacher := getattr(config, "teacher", None)) is not None:
        lines.append(f"not counted: the teacher ({teacher.path})")
    return lines


def _layout_fields() -> list[str]:
    from megarl.config.parallel import ParallelConfig

    return [name for name in PlanTrainerConfig.model_fields if name in ParallelConfig.model_fields]
