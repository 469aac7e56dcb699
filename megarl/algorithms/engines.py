"""Starting an engine beside the trainer and giving it the trainer's weights."""

from __future__ import annotations

from pathlib import Path

from megarl.config.schema import EngineConfig, ModelConfig, WeightsConfig
from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models.table import Architecture
from megarl.rollout.vllm_engine import VllmEngine
from megarl.trainer.policy import Policy, broadcast, gather
from megarl.weights.checksum import RegionChecksum
from megarl.weights.handover import Alias, Copy, SharedStorage, SourceView
from megarl.weights.plan import Owner, Planner, Reader


def start_engine(
    model: ModelConfig,
    engine: EngineConfig,
    weights: WeightsConfig | None = None,
    *,
    max_model_len: int,
    seed: int,
    log_dir: Path,
) -> VllmEngine:
    """Start in the background; the caller builds the trainer meanwhile and joins with attach_weights."""
    return VllmEngine.start(
        Path(model.path),
        engine,
        dtype=model.dtype,
        max_model_len=max_model_len,
        seed=seed,
        log_dir=log_dir,
        keep_kv_cache=weights is not None and weights.keep_kv_cache,
    )


def attach_weights(engine: VllmEngine, architecture: Architecture, owners: list[Owner]) -> list[str]:
    """Wait for the engine, plan and bind. Returns lines for the log: what is aliased, what copied and why."""
    engine.wait_ready()
    described = engine.describe_parameters()
    layout = ParallelLayout(tensor=len(described), expert_tensor=len(described))
    planner = Planner(owners)
    plans = [
        planner.plan(Reader(architecture.engine_regions(layout, layout.coordinates(rank)), params))
        for rank, params in enumerate(described)
    ]
    lines = []
    for rank, (plan, report) in enumerate(zip(plans, engine.attach(plans), strict=True)):
        lines.append(
            f"engine rank {rank}: {len(report.aliased)} parameters are the trainer's memory "
            f"({report.aliased_bytes / 2**20:.1f} MiB, 0 bytes to move)"
        )
        by_reason: dict[str, list[str]] = {}
        for name in report.copied:
            by_reason.setdefault(plan.copy_reasons.get(name, "the engine keeps its own layout"), []).append(
                name
            )
        for reason, names in by_reason.items():
            lines.append(
                f"engine rank {rank}: {len(names)} parameters are copied at every step "
                f"({report.copied_bytes / 2**20:.1f} MiB in all): {reason} (first: {names[0]})"
            )
    return lines


def verify_weights(engine: VllmEngine | None, policy: Policy) -> None:
    """Compare checksums of every region on both sides; every trainer rank calls it, rank 0 has the engine.

    Raises UserError naming the first region that differs and the number of those that do.
    """
    asked: list[tuple[SharedStorage, SourceView, str]] = []
    theirs: list[tuple[int, RegionChecksum]] = []
    if engine is not None:
        for rank, (plan, sums) in enumerate(zip(engine.plans, engine.checksums(), strict=True)):
            theirs += [(rank, checksum) for checksum in sums]
            pieces: list[Alias | Copy] = [*plan.aliases, *plan.copies]
            asked += [
                (plan.storages[piece.source.storage], piece.source, checksum.dtype)
                for piece, checksum in zip(pieces, sums, strict=True)
            ]
    answers = gather(policy.weight_checksums(broadcast(asked)))
    ours = {number: value for answer in answers for number, value in answer.items()}
    differ = [number for number, (_, checksum) in enumerate(theirs) if ours[number] != checksum.value]
    if differ:
        rank, checksum = theirs[differ[0]]
        raise UserError(
            f"weights.verify: {len(differ)} of {len(theirs)} regions differ between trainer and engine; the "
            f"first is {checksum.param}{list(checksum.index)} of engine rank {rank}"
        )
