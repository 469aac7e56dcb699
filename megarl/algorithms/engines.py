"""Starting an engine beside the trainer and giving it the trainer's weights."""

from __future__ import annotations

from pathlib import Path

from megarl.config.schema import EngineConfig, ModelConfig
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models.table import Architecture
from megarl.rollout.vllm_engine import VllmEngine
from megarl.weights.plan import Owner, plan_weights


def start_engine(
    model: ModelConfig, engine: EngineConfig, *, max_model_len: int, seed: int, log_dir: Path
) -> VllmEngine:
    """Start in the background; the caller builds the trainer meanwhile and joins with attach_weights."""
    return VllmEngine.start(
        Path(model.path), engine, dtype=model.dtype, max_model_len=max_model_len, seed=seed, log_dir=log_dir
    )


def attach_weights(engine: VllmEngine, architecture: Architecture, owners: list[Owner]) -> list[str]:
    """Wait for the engine, plan and bind. Returns lines for the log: what is aliased, what copied and why."""
    engine.wait_ready()
    described = engine.describe_parameters()
    layout = ParallelLayout(tensor=len(described))
    plans = [
        plan_weights(owners, architecture.engine_regions(layout, RankCoordinates(tensor=rank)), params)
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
