"""Check that a model can be trained under a layout, from its config.json, before any process starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from megarl.config.model import ModelConfig, read_model_config
from megarl.config.online import OnlineConfig
from megarl.config.parallel import ParallelConfig
from megarl.config.rollout import EngineConfig
from megarl.config.router import RouterConfig
from megarl.config.training import TrainingRoot
from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.models.divisibility import division_problems
from megarl.models.lora import check_lora
from megarl.models.table import Architecture

_NUM_NEAREST = 3


def check_training(config: TrainingRoot) -> None:
    """Raise UserError if the model cannot be trained as configured."""
    if config.trainer.backend == "torch":
        _check_torch(config)
        return
    architecture = load_architecture(config.model.path)
    check_layout(architecture, config.parallel)
    replay = isinstance(config, OnlineConfig) and config.rollout.router_replay
    check_router(architecture, config.router, replay=replay)
    check_lora(architecture, config.lora)
    if isinstance(config, OnlineConfig):
        check_engine(architecture, config.rollout.engine)


def _check_torch(config: TrainingRoot) -> None:
    """Check for the torch backend, which checks further when transformers has built the model."""
    architecture = load_architecture(config.model.path, any_family=True)
    spec, size = architecture.spec, config.parallel.tensor_parallel_size
    heads = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads}
    wrong = [
        f"parallel.tensor_parallel_size: {name} = {count} does not divide by {size} tensor ranks"
        for name, count in heads.items()
        if count % size
    ]
    wrong += _unknown_code(config.model)
    check_lora(architecture, config.lora)
    if isinstance(config, OnlineConfig):
        check_engine(architecture, config.rollout.engine)
    if wrong:
        raise UserError("\n".join(wrong))


def _unknown_code(model: ModelConfig) -> Iterator[str]:
    """A line for a model that transformers does not have, unless its own code may run."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    config = read_model_config(model.path)
    name = config.get("model_type")
    if name in KNOWN:
        return
    if "auto_map" not in config:
        yield f"model.path: transformers has no language model of model_type {name!r}"
    elif not model.trust_remote_code:
        why = f"{model.path} brings its own code for model_type {name!r}, which transformers does not have"
        yield f"model.trust_remote_code: {why}; set it to true to run that code"


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raise UserError with every violation and the nearest valid layouts with the same number of ranks."""
    if architecture.spec.not_trainable is not None:
        why = f"training {architecture.spec.family} is not supported: {architecture.spec.not_trainable}"
        raise UserError(f"model.path: {why}")
    wrong = list(layout_problems(architecture, parallel))
    if not wrong:
        return
    near = [_describe(other, parallel) for other in nearest_layouts(architecture, parallel)]
    wrong += [f"would do on {parallel.num_processes} ranks: {text}" for text in near]
    if not near:
        wrong.append(f"no layout of {parallel.num_processes} ranks would do; change parallel.num_processes")
    raise UserError("\n".join(wrong))


def check_engine(architecture: Architecture, engine: EngineConfig) -> None:
    """Raise UserError with every reason why the engine's ranks cannot split the model, and valid sizes."""
    wrong = list(engine_problems(architecture, engine))
    if not wrong:
        return
    first = 2 if engine.expert_parallel else 1
    smaller = [
        engine.model_copy(update={"tensor_parallel_size": n})
        for n in range(first, engine.tensor_parallel_size)
    ]
    sizes = [str(e.tensor_parallel_size) for e in smaller if not any(engine_problems(architecture, e))]
    if sizes:
        wrong.append(f"would do: rollout.engine.tensor_parallel_size={' or '.join(sizes)}")
    raise UserError("\n".join(wrong))


def engine_problems(architecture: Architecture, engine: EngineConfig) -> Iterator[str]:
    """Yield one line per reason why an engine's ranks cannot split the model."""
    moe, layout = architecture.spec.moe, engine_layout(engine)
    yield from division_problems(architecture, "engine", layout, "rollout.engine")
    if not engine.expert_parallel:
        return
    if moe is None:
        yield f"rollout.engine.expert_parallel: {architecture.spec.family} has no experts"
    elif moe.num_experts % layout.expert:
        yield (
            f"rollout.engine.expert_parallel: {moe.num_experts} experts do not divide "
            f"by {layout.expert} tensor ranks"
        )


def engine_layout(engine: EngineConfig) -> ParallelLayout:
    """Return the layout of an engine: each expert sharded over all ranks, or whole experts per rank."""
    ranks, whole = engine.tensor_parallel_size, engine.expert_parallel
    return ParallelLayout(tensor=ranks, expert=ranks if whole else 1, expert_tensor=1 if whole else ranks)


def check_router(architecture: Architecture, router: RouterConfig, *, replay: bool = False) -> None:
    """Raise UserError for settings that do not apply to the model; ``replay`` is rollout.router_replay."""
    moe = architecture.spec.moe
    asked = [f"router.{name}" for name, value in router if value != 0] + ["rollout.router_replay"] * replay
    if moe is None and asked:
        raise UserError(f"{asked[0]}: {architecture.spec.family} has no experts")
    if moe is not None and router.bias_update_rate and not moe.router_bias:
        raise UserError(f"router.bias_update_rate: the router of {architecture.spec.family} has no bias")
    if moe is not None and router.aux_loss_coef is None and not moe.aux_loss_coef:
        raise UserError("router.aux_loss_coef: null, but config.json has no router_aux_loss_coef above 0")


def layout_problems(architecture: Architecture, parallel: ParallelConfig) -> Iterator[str]:
    """Yield one line per reason why the model does not fit the layout."""
    spec, experts = architecture.spec, parallel.expert_parallel_size
    try:
        layout = layout_of(parallel)
    except UserError as error:
        yield str(error)
        return
    yield from division_problems(architecture, "trainer", layout, "parallel")
    try:
        layout.stage_layers(spec.num_layers, 0)
    except UserError as error:
        yield str(error)
    if spec.moe is None and experts > 1:
        yield f"parallel.expert_parallel_size: {experts}, but {spec.family} has no experts"
    elif spec.moe is None and layout.expert_tensor > 1:
        size = layout.expert_tensor
        yield f"parallel.expert_tensor_parallel_size: {size}, but {spec.family} has no experts"
    elif spec.moe is not None and spec.moe.num_experts % experts:
        yield f"parallel.expert_parallel_size: {spec.moe.num_experts} experts do not divide by {experts}"
    if spec.moe is not None and layout.tensor > 1 and not layout.sequence_parallel:
        yield "parallel.sequence_parallel: must be true for experts with tensor_parallel_size > 1"


def layout_of(parallel: ParallelConfig, num_ranks: int | None = None) -> ParallelLayout:
    """Return the layout of ``num_ranks`` (None: as configured); UserError if the sizes do not divide them."""
    return ParallelLayout.from_world_size(
        parallel.num_processes if num_ranks is None else num_ranks,
        tensor=parallel.tensor_parallel_size,
        pipeline=parallel.pipeline_parallel_size,
        context=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        virtual=parallel.virtual_pipeline_parallel_size,
        expert=parallel.expert_parallel_size,
        expert_tensor=parallel.expert_tensor_parallel_size,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


def nearest_layouts(architecture: Architecture, parallel: ParallelConfig) -> list[ParallelConfig]:
    """Return valid layouts of as many ranks, closest to the configured one (in factors of two)."""
    others = sorted(_candidates(architecture, parallel), key=lambda other: _distance(other, parallel))
    work = (other for other in others if not any(layout_problems(architecture, other)))
    return list(itertools.islice(work, _NUM_NEAREST))


def _candidates(architecture: Architecture, parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """Yield every layout whose sizes divide the ranks."""
    ranks, moe = parallel.num_processes, architecture.spec.moe is not None
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    shared = sizes if moe else [1]
    for tensor, pipeline, context, expert, split in itertools.product(sizes, sizes, sizes, shared, shared):
        if ranks % (tensor * pipeline * context) or ranks // pipeline % (expert * split):
            continue
        yield parallel.model_copy(
            update={
                "tensor_parallel_size": tensor,
                "pipeline_parallel_size": pipeline,
                "context_parallel_size": context,
                "expert_parallel_size": expert,
                "expert_tensor_parallel_size": split,
                "sequence_parallel": tensor > 1 and (parallel.sequence_parallel or moe),
                "virtual_pipeline_parallel_size": parallel.virtual_pipeline_parallel_size
                if pipeline > 1
                else 1,
                "first_stage_layers": None,
                "last_stage_layers": None,
            }
        )


_SIZES = ("tensor", "pipeline", "context", "expert", "expert_tensor")


def _distance(one: ParallelConfig, other: ParallelConfig) -> float:
    names = [f"{size}_parallel_size" for size in _SIZES]
    return sum(abs(math.log2(getattr(one, name) / getattr(other, name))) for name in names)


def _describe(layout: ParallelConfig, asked: ParallelConfig) -> str:
    """Format a layout as overrides, without sizes that are 1 on both sides."""
    names = [f"{size}_parallel_size" for size in _SIZES]
    parts = [
        f"parallel.{name}={getattr(layout, name)}"
        for name in names
        if getattr(layout, name) > 1 or getattr(asked, name) > 1
    ]
    if layout.sequence_parallel != asked.sequence_parallel:
        parts.append(f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}")
    return " ".join(parts) or "data parallelism alone"
