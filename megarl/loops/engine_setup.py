"""Start an engine alongside the trainer and attach it to the trainer's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megarl import platform
from megarl.cluster.collectives import broadcast, gather
from megarl.config.model import ModelConfig, read_model_config
from megarl.config.online import WeightsConfig
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.engine_group import start_engines
from megarl.inference.interface import AttachReport, Engine
from megarl.inference.placement import TrainerPlace, place_engines
from megarl.models.any_family import has_engine_table
from megarl.models.layout_checks import check_engine, engine_layout
from megarl.models.table import Architecture, Region
from megarl.trainer.interface import Trainer, Transport
from megarl.weights.checksum import RegionChecksum, RegionQuery
from megarl.weights.plan import Owner, Planner, Reader
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, SourceView, Storage, WeightPlan


def start_engine(
    model: ModelConfig,
    architecture: Architecture,
    engine: EngineConfig,
    weights: WeightsConfig | None = None,
    *,
    max_model_len: int,
    seed: int,
    log_dir: Path,
    record_routing: bool = False,
    ranks: Sequence[TrainerPlace] = (),
    while_training: bool = False,
) -> Engine:
    """Start the engine in the background; build the trainer meanwhile, then join with attach_weights.

    ``ranks`` are the trainer ranks' locations, which several engines are placed by. With ``while_training``
    the engine shares the cores with a working trainer.

    Raises:
        UserError: the engine's ranks cannot split the model, this platform's engine computes wrong logprobs
        for
            it, or the engines cannot be distributed over the ranks' hosts.
    """
    check_engine(architecture, engine)
    if engine.backend == "vllm":
        _check_vllm(model, architecture, engine, record_routing=record_routing)
    return start_engines(
        Path(model.path),
        engine,
        place_engines(engine, ranks, while_training=while_training),
        dtype=model.dtype,
        max_model_len=max_model_len,
        seed=seed,
        log_dir=log_dir,
        keep_kv_cache=weights is not None and weights.keep_kv_cache,
        offload_kv_cache=weights is not None and "kv_cache" in weights.offload,
        record_routing=record_routing,
        trust_remote_code=model.trust_remote_code,
    )


def _check_vllm(
    model: ModelConfig, architecture: Architecture, engine: EngineConfig, *, record_routing: bool
) -> None:
    """Raise UserError for what vLLM cannot do on this platform."""
    check_batch_invariance(engine)
    if record_routing and not engine.enable_prefix_caching and platform.chosen_name() == "cuda":
        raise UserError(
            "rollout.router_replay: needs rollout.engine.enable_prefix_caching = true on a GPU, where vLLM "
            "keeps the experts of a prompt with its cached blocks"
        )
    latent = architecture.spec.mla or "kv_lora_rank" in read_model_config(model.path)
    if latent and platform.chosen_name() == "cpu":
        # Seen with vLLM 0.32: equal weights, logprobs up to 2.4 from Hugging Face's (docs/models.md).
        raise UserError(
            f"model.path: {model.path} has latent attention; vLLM computes wrong logprobs for it on a CPU: "
            "rollout.engine.backend = hf computes it (sft, dpo, rm and convert need no engine)"
        )


def check_batch_invariance(engine: EngineConfig) -> None:
    """Raise UserError if vLLM has no batch-invariant kernels for this machine's GPUs."""
    if engine.batch_invariant and platform.chosen_name() == "cuda":
        import torch

        capability = torch.cuda.get_device_capability()
        if capability < (9, 0):
            found = ".".join(map(str, capability))
            raise UserError(
                "rollout.engine.batch_invariant: needs GPUs of compute capability 9.0 or later, such as an "
                f"H100 (here: {found})"
            )


def rounding_note(engine: EngineConfig) -> list[str]:
    """Return a line for the log if seeds alone do not determine what several engines draw."""
    if platform.chosen_name() == "cpu" or engine.batch_invariant or engine.data_parallel_size == 1:
        return []
    return [
        "on a GPU rounding depends on what is decoded together: the engine that draws a response may change "
        "it (not with rollout.engine.batch_invariant)"
    ]


def check_offload(weights: WeightsConfig) -> None:
    """Raise UserError for parts that this platform cannot offload."""
    if "optimizer" in weights.offload and platform.current().name == "cpu":
        raise UserError(
            "weights.offload: optimizer needs a GPU (on a CPU it is in host memory already); gradients "
            "and kv_cache can be freed here"
        )


def attach_weights(
    engine: Engine, architecture: Architecture, owners: list[Owner], transport: Transport = "auto"
) -> list[str]:
    """Wait for the engine, plan and bind. Return lines for the log: what is aliased or copied, and why.

    Raises:
        UserError: ``transport`` is shared_memory and an owner is on another host.
    """
    engine.wait_ready()
    described, places = engine.describe_parameters(), engine.places()
    reported = engine.regions({region.hf for owner in owners for region in owner.regions})
    streamed: dict[str, ParamInfo] = {}
    if reported is None and not has_engine_table(architecture):
        streamed = _tensors_of(architecture, owners)
        described, reported = [streamed] * len(described), _whole(streamed)
    layout = engine_layout(engine.config)
    planner = Planner(owners, peers_only=transport == "peer")
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]
    regions = [reported or architecture.engine_regions(layout, at) for at in coordinates]
    plans = []
    for rank, (params, (host, device)) in enumerate(zip(described, places, strict=True)):
        coordinate = rank % layout.world_size  # ranks of all engines, end to end
        if params == described[coordinate]:  # identical engine ranks share one plan
            params = described[coordinate]
        plan = planner.plan(Reader(regions[coordinate], params, host, device))
        plans.append(replace(plan, streamed=streamed))
    far = sorted({peer.rank for plan in plans for peer in plan.peers})
    if far and transport == "shared_memory":
        raise UserError(
            f"weights.transport: shared_memory, but trainer ranks {far} are on other hosts than the engine"
        )
    lines = []
    for rank, (plan, report) in enumerate(zip(plans, engine.attach(plans), strict=True)):
        lines += [f"engine rank {rank}: {line}" for line in _describe(plan, report)]
    return lines + rounding_note(engine.config)


def _describe(plan: WeightPlan, report: AttachReport) -> Iterator[str]:
    """Yield log lines about one engine rank's work at every weight sync."""
    if report.note:
        yield report.note
    if not plan.streamed:
        yield from _describe_parameters(plan, report)
    if plan.peers:
        ranks = sorted({peer.rank for peer in plan.peers})
        yield (
            f"{report.received_bytes / 2**20:.1f} MiB of them arrive point to point from trainer "
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        )


def _describe_parameters(plan: WeightPlan, report: AttachReport) -> Iterator[str]:
    yield (
        f"{len(report.aliased)} parameters are the trainer's memory "
        f"({report.aliased_bytes / 2**20:.1f} MiB, 0 bytes to move)"
    )
    by_reason: dict[str, list[str]] = {}
    for name in report.copied:
        by_reason.setdefault(plan.copy_reasons.get(name, "the engine keeps its own layout"), []).append(name)
    total = (report.copied_bytes + report.received_bytes) / 2**20
    for reason, names in by_reason.items():
        yield (
            f"{len(names)} parameters are copied at every step ({total:.1f} MiB in all): {reason} "
            f"(first: {names[0]})"
        )


def _tensors_of(architecture: Architecture, owners: list[Owner]) -> dict[str, ParamInfo]:
    """Return the checkpoint's tensors, in the types that the trainer has them in.

    Raises:
        UserError: no trainer rank holds one.
    """
    dtypes = {r.hf: owner.params[r.param].dtype for owner in owners for r in owner.regions}
    shapes = architecture.hf_shapes()
    if missing := sorted(shapes.keys() - dtypes.keys()):
        raise UserError("\n".join(f"weights: no trainer rank has {name}" for name in missing))
    return {name: ParamInfo(shape, dtypes[name]) for name, shape in shapes.items()}


def _whole(tensors: Mapping[str, ParamInfo]) -> list[Region]:
    """Return each tensor as one region, of a parameter of its own name."""
    boxes = {name: tuple((0, size) for size in info.shape) for name, info in tensors.items()}
    return [Region(name, box, name, box) for name, box in boxes.items()]


def verify_weights(engine: Engine | None, policy: Trainer) -> None:
    """Compare checksums of every region; every trainer rank calls it, rank 0 has the engine.

    Raises:
        UserError: regions differ; names the first and gives their number.
    """
    queries: list[RegionQuery] = []
    theirs: list[tuple[int, RegionChecksum]] = []
    if engine is not None:
        for rank, (plan, sums) in enumerate(zip(engine.plans, engine.checksums(), strict=True)):
            theirs += [(rank, checksum) for checksum in sums]
            queries += region_queries(plan, sums)
    answers = gather(policy.weights.checksums(broadcast(queries)))
    ours = {number: value for answer in answers for number, value in answer.items()}
    differ = [number for number, (_, checksum) in enumerate(theirs) if ours[number] != checksum.value]
    if differ:
        rank, checksum = theirs[differ[0]]
        raise UserError(
            f"weights.verify: {len(differ)} of {len(theirs)} regions differ between trainer and engine; the "
            f"first is {checksum.param}{list(checksum.index)} of engine rank {rank}"
        )


def region_queries(plan: WeightPlan, sums: list[RegionChecksum]) -> list[RegionQuery]:
    """Return the trainer regions that hold the data of the engine's checksums, in their order."""
    mapped: list[Alias | Copy] = [*plan.aliases, *plan.copies]
    sources: list[tuple[SourceView, Storage | None, int]]
    sources = [(piece.source, plan.storages[piece.source.storage], -1) for piece in mapped]
    sources += [(peer.source, None, peer.rank) for peer in plan.peers]
    return [
        RegionQuery(source, checksum.dtype, storage, rank)
        for (source, storage, rank), checksum in zip(sources, sums, strict=True)
    ]
