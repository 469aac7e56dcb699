"""The layouts of trainer and engine in a plan, and their violations.

Trainer rank r is on GPU r. Engine ranks are placed as in vLLM: the GPUs of an engine are consecutive; within
it tensor ranks vary fastest, then pipeline stages, then data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megarl.config.plan import PlanConfig, PlanEngineConfig, PlanTrainerConfig
from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.divisibility import Side as Side
from megarl.models.divisibility import division_problems
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture, Rule


@dataclass(frozen=True, slots=True)
class Layouts:
    """Validated layouts; ``engine`` is that of one of the ``num_engines`` engines (0: one rank)."""

    trainer: ParallelLayout
    engine: ParallelLayout
    num_engines: int
    colocated: bool

    @property
    def engine_gpus(self) -> int:
        """Number of GPUs of all engines."""
        return self.engine.world_size * self.num_engines

    @property
    def first_engine_gpu(self) -> int:
        """Number of the GPU of engine rank 0; trainer rank 0 has GPU 0."""
        return 0 if self.colocated else self.trainer.world_size

    def engine_coordinates(self, rank: int) -> RankCoordinates:
        """Return the coordinates, within its engine, of rank ``rank`` of all engines."""
        engine = self.engine
        rest, tensor = divmod(rank % engine.world_size, engine.tensor)
        data, stage = divmod(rest, engine.pipeline)
        return engine.coordinates(stage * engine.stage_size + data * engine.tensor + tensor)


def build_layouts(config: PlanConfig, architecture: Architecture, gpus: int) -> Layouts:
    """Return the layouts of ``config`` on ``gpus`` trainer GPUs; UserError lists every violation."""
    spec = architecture.spec
    trainer, engine, engine_gpus = _trainer_layout(config.trainer, gpus), ParallelLayout(), 0
    wrong = [
        *_backend_problems(config.trainer, trainer),
        *_trainer_problems(config.trainer, spec, gpus),
        *_stage_problems(trainer, spec),
        *division_problems(architecture, "trainer", trainer, "trainer"),
        *_workload_problems(config, spec),
    ]
    if (asked := config.engine) is not None:
        engine, engine_gpus = _engine_layout(asked, spec), gpus if asked.colocated else asked.num_gpus or 0
        wrong += [
            *_engine_problems(asked, spec, engine_gpus),
            *_engine_stage_problems(asked, spec),
            *division_problems(architecture, "engine", engine, "engine"),
        ]
    if wrong:
        raise UserError("\n".join(wrong))
    return Layouts(trainer, engine, engine_gpus // engine.world_size, asked is None or asked.colocated)


def _trainer_layout(trainer: PlanTrainerConfig, gpus: int) -> ParallelLayout:
    """Return the layout, with a data-parallel size of at least 1 even with too few GPUs."""
    model = trainer.tensor_parallel_size * trainer.pipeline_parallel_size * trainer.context_parallel_size
    return ParallelLayout(
        tensor=trainer.tensor_parallel_size,
        pipeline=trainer.pipeline_parallel_size,
        context=trainer.context_parallel_size,
        data=max(1, gpus // model),
        sequence_parallel=trainer.sequence_parallel,
        virtual=trainer.virtual_pipeline_parallel_size,
        expert=trainer.expert_parallel_size,
        expert_tensor=trainer.expert_tensor_parallel_size,
        first_stage_layers=trainer.first_stage_layers,
        last_stage_layers=trainer.last_stage_layers,
    )


def _engine_layout(engine: PlanEngineConfig, spec: ModelSpec) -> ParallelLayout:
    ranks = engine.tensor_parallel_size * engine.data_parallel_size
    stages = vllm_stage_layers(spec.num_layers, engine.pipeline_parallel_size)
    return ParallelLayout(
        tensor=engine.tensor_parallel_size,
        pipeline=engine.pipeline_parallel_size,
        data=engine.data_parallel_size,
        expert=ranks if engine.expert_parallel else 1,
        expert_tensor=1 if engine.expert_parallel or spec.moe is None else ranks,
        first_stage_layers=stages[0],
        last_stage_layers=stages[-1] if len(stages) > 1 else None,
    )


def vllm_stage_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage of an engine: vLLM gives what does not divide to the stages before the
    last one, from the back (vllm.distributed.utils.get_pp_indices).
    """
    even, more = divmod(num_layers, stages)
    sizes = [even] * stages
    for place in range(2, more + 2):
        sizes[-place] += 1
    return sizes


def _backend_problems(trainer: PlanTrainerConfig, layout: ParallelLayout) -> Iterator[str]:
    """Yield a line for each setting that the backend lacks, as a run refuses it."""
    lacks = _OF_MEGATRON if trainer.backend == "torch" else _OF_TORCH
    other = "megatron" if trainer.backend == "torch" else "torch"
    for name in lacks:
        if (value := getattr(trainer, name)) != type(trainer).model_fields[name].default:
            yield f"trainer.{name}: needs trainer.backend = {other} (got {value})"
    if trainer.backend == "megatron":
        return
    if layout.data % trainer.replicate_size:
        yield (
            f"trainer.replicate_size: must divide the {layout.data} data-parallel ranks "
            f"(got {trainer.replicate_size})"
        )


_OF_MEGATRON = (
    *("pipeline_parallel_size", "virtual_pipeline_parallel_size", "first_stage_layers", "last_stage_layers"),
    *("context_parallel_size", "expert_parallel_size", "expert_tensor_parallel_size"),
    "distributed_optimizer",
)
_OF_TORCH = ("replicate_size", "reshard_after_forward", "reduce_each_microbatch", "cpu_offload")


def _trainer_problems(trainer: PlanTrainerConfig, spec: ModelSpec, gpus: int) -> Iterator[str]:
    tensor, stages = trainer.tensor_parallel_size, trainer.pipeline_parallel_size
    model = tensor * stages * trainer.context_parallel_size
    if gpus % model:
        yield (
            f"--gpus: {gpus} GPUs cannot be divided by trainer.tensor x pipeline x context parallel size "
            f"= {tensor} x {stages} x {trainer.context_parallel_size} = {model}"
        )
    experts = trainer.expert_parallel_size * trainer.expert_tensor_parallel_size
    if gpus % stages == 0 and gpus // stages % experts:
        yield (
            f"trainer.expert_parallel_size: the {gpus // stages} ranks of a pipeline stage cannot be divided "
            f"by expert x expert-tensor = {trainer.expert_parallel_size} x "
            f"{trainer.expert_tensor_parallel_size} = {experts}"
        )
    if trainer.sequence_parallel and tensor == 1:
        yield "trainer.sequence_parallel: needs trainer.tensor_parallel_size > 1"
    needs_sequence = spec.moe is not None and tensor > 1 and trainer.backend == "megatron"
    if needs_sequence and not trainer.sequence_parallel:
        yield "trainer.sequence_parallel: must be true for experts with tensor_parallel_size > 1"
    if spec.moe is None and experts > 1:
        yield f"trainer.expert_parallel_size: {spec.family} has no experts (got {experts} ranks)"
    elif spec.moe is not None and spec.moe.num_experts % trainer.expert_parallel_size:
        yield (
            f"trainer.expert_parallel_size: {spec.moe.num_experts} experts do not divide by "
            f"{trainer.expert_parallel_size}"
        )
    virtual, count = trainer.virtual_pipeline_parallel_size, trainer.num_microbatches
    if virtual > 1 and count is not None and count % stages:
        yield f"trainer.num_microbatches: {count} do not divide by {stages} stages (interleaved schedule)"


def _stage_problems(trainer: ParallelLayout, spec: ModelSpec) -> Iterator[str]:
    uneven = trainer.first_stage_layers is not None or trainer.last_stage_layers is not None
    if trainer.virtual > 1 and trainer.pipeline == 1:
        yield "trainer.virtual_pipeline_parallel_size: needs trainer.pipeline_parallel_size > 1"
    if uneven and trainer.pipeline == 1:
        yield "trainer.first_stage_layers, last_stage_layers: need trainer.pipeline_parallel_size > 1"
    elif uneven and trainer.virtual > 1:
        yield "trainer.virtual_pipeline_parallel_size: needs stages of equal size"
    else:
        try:
            trainer.stage_layers(spec.num_layers, 0)
        except UserError as error:
            yield str(error).replace("parallel.", "trainer.", 1)


def _workload_problems(config: PlanConfig, spec: ModelSpec) -> Iterator[str]:
    trainer, work = config.trainer, config.workload
    if config.weights.offload and (config.engine is None or not config.engine.colocated):
        yield "weights.offload: needs engine.colocated: it has no effect on separate GPUs"
    if work.sequence_length > spec.max_position_embeddings:
        yield (
            f"workload.sequence_length: {work.sequence_length} is more than the model's "
            f"{spec.max_position_embeddings} positions"
        )
    if work.sequence_length > work.tokens_per_microbatch:
        yield (
            f"workload.tokens_per_microbatch: {work.tokens_per_microbatch} does not hold a sequence of "
            f"{work.sequence_length} tokens"
        )
    parts = trainer.context_parallel_size * (trainer.tensor_parallel_size if trainer.sequence_parallel else 1)
    if work.tokens_per_microbatch % parts:
        yield (
            f"workload.tokens_per_microbatch: {work.tokens_per_microbatch} tokens do not divide by "
            f"{parts} context x sequence parallel ranks"
        )


def _engine_problems(engine: PlanEngineConfig, spec: ModelSpec, gpus: int) -> Iterator[str]:
    ranks = engine.tensor_parallel_size * engine.data_parallel_size
    world = ranks * engine.pipeline_parallel_size
    if engine.colocated and engine.num_gpus is not None:
        yield "engine.num_gpus: not with colocated engines, which use the trainer's GPUs"
    if not engine.colocated and engine.num_gpus is None:
        yield "engine.num_gpus: required if engine.colocated is false"
    elif gpus % world:
        yield (
            f"engine: {gpus} GPUs cannot be divided by tensor x pipeline x data parallel size = "
            f"{engine.tensor_parallel_size} x {engine.pipeline_parallel_size} x "
            f"{engine.data_parallel_size} = {world}"
        )
    if (engine.kv_cache_gib is None) == (engine.max_num_seqs is None):
        yield "engine.kv_cache_gib, engine.max_num_seqs: give one of the two"
    if spec.moe is None and engine.data_parallel_size > 1:
        yield f"engine.data_parallel_size: {spec.family} has no experts to split; use more engines"
    if engine.expert_parallel and spec.moe is None:
        yield f"engine.expert_parallel: {spec.family} has no experts"
    elif engine.expert_parallel and ranks == 1:
        yield "engine.expert_parallel: needs tensor or data parallel ranks to split the experts"
    elif engine.expert_parallel and spec.moe is not None and spec.moe.num_experts % ranks:
        yield f"engine.expert_parallel: {spec.moe.num_experts} experts do not divide by {ranks} ranks"


def _engine_stage_problems(engine: PlanEngineConfig, spec: ModelSpec) -> Iterator[str]:
    stages = engine.pipeline_parallel_size
    if stages > 1 and spec.tied_embeddings:
        yield "engine.pipeline_parallel_size: tied embeddings over engine stages are not supported"
    sizes = vllm_stage_layers(spec.num_layers, stages)
    if min(sizes) == 0:
        yield f"engine.pipeline_parallel_size: {spec.num_layers} layers do not fill {stages} stages"
    elif len(set(sizes[1:-1])) > 1:
        yield (
            f"engine.pipeline_parallel_size: vLLM would split {spec.num_layers} layers into {sizes}; "
            "inner stages must have equal size"
        )


def engine_table(architecture: Architecture, layout: ParallelLayout) -> Architecture:
    """Return the table for this engine layout.

    With experts over both tensor and data ranks, vLLM splits tokens over the tensor ranks in MoE layers and
    replicates shared experts (use_sequence_parallel_moe).
    """
    if layout.expert == 1 or layout.tensor == 1 or layout.data == 1:
        return architecture
    rules = tuple(_whole(rule) if ".shared_experts." in rule.hf else rule for rule in architecture.rules)
    return replace(architecture, rules=rules)


def _whole(rule: Rule) -> Rule:
    return replace(rule, engine=tuple(replace(place, dim=None) for place in rule.engine))
