"""Training jobs without an engine on one and two fake GPUs, against the same job on a CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fake_cuda.scenarios.harness import Workbench

pytestmark = pytest.mark.timeout(1800)

FP32 = {"loss": 1e-5, "grad_norm": 1e-4}
# Both sides round to bfloat16 in the same places but in attention, whose kernels differ.
BF16 = {"loss": 2e-3, "grad_norm": 2e-2}


@dataclass(frozen=True)
class Scenario:
    """A job and what it is configured with."""

    name: str
    job: str = "sft"
    experts: int = 0
    figures: dict[str, float] = field(default_factory=lambda: FP32)
    options: dict[str, Any] = field(default_factory=dict)


def two(**layout: Any) -> dict[str, Any]:
    return {"parallel.num_processes": 2, **{f"parallel.{name}": value for name, value in layout.items()}}


LORA = {"lora.rank": 4, "lora.alpha": 8.0}
SHARDED = {"optimizer.distributed": True}
QUICK = [
    Scenario("sft"),
    Scenario("sft tensor 2, sequence parallel", options=two(tensor_parallel_size=2, sequence_parallel=True)),
]
SLOW = [
    Scenario("sft pipeline 2", options=two(pipeline_parallel_size=2)),
    Scenario("sft context 2", options=two(context_parallel_size=2)),
    Scenario("sft data 2, distributed optimizer", options=two() | SHARDED),
    Scenario("sft bfloat16", options={"model.dtype": "bfloat16"}, figures=BF16),
    Scenario(
        "sft bfloat16 data 2, distributed optimizer",
        options=two() | SHARDED | {"model.dtype": "bfloat16"},
        figures=BF16,
    ),
    Scenario("sft experts 2", experts=4, options=two(expert_parallel_size=2)),
    Scenario(
        "sft bfloat16 experts 2",
        experts=4,
        options=two(expert_parallel_size=2) | {"model.dtype": "bfloat16"},
        figures=BF16,
    ),
    Scenario("sft LoRA", options=LORA),
    Scenario("dpo", job="dpo"),
    Scenario("dpo tensor 2", job="dpo", options=two(tensor_parallel_size=2)),
]


def check(scenario: Scenario, bench: Workbench, agree: Callable[..., None]) -> None:
    model = bench.make_model(f"experts-{scenario.experts}", num_experts=scenario.experts)
    slug = re.sub(r"\W+", "-", scenario.name)
    runs = {
        where: bench.run(where, scenario.job, f"{slug}-{where}", model=model, options=scenario.options)
        for where in ("cuda", "cpu")
    }
    assert "CUDA kernels" in runs["cuda"].log, "it ran on something else"
    figures = dict(scenario.figures)
    if scenario.job == "sft":
        figures["validation_loss"] = figures["loss"]
    agree(scenario.name, runs["cuda"], runs["cpu"], figures)
    assert max(runs["cuda"].column("grad_norm")) > 0


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_trains_as_on_a_cpu(scenario: Scenario, bench: Workbench, agree: Callable[..., None]) -> None:
    check(scenario, bench, agree)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SLOW, ids=lambda scenario: scenario.name)
def test_trains_as_on_a_cpu_slow(scenario: Scenario, bench: Workbench, agree: Callable[..., None]) -> None:
    check(scenario, bench, agree)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_as_uninterrupted(processes: int, bench: Workbench, agree: Callable[..., None]) -> None:
    """Six steps at a stretch, against two that start again from their checkpoint of step 3."""
    model = bench.make_model("experts-0")
    options = {
        "checkpoint.interval": 3,
        "parallel.num_processes": processes,
        "optimizer.distributed": processes == 2,
    }
    name = f"resume-{processes}"
    whole = bench.run(
        "cuda", "sft", f"{name}-whole", model=model, options=options | {"training.num_steps": 6}
    )
    bench.run("cuda", "sft", name, model=model, options=options | {"training.num_steps": 3})
    parts = bench.run("cuda", "sft", name, model=model, options=options | {"training.num_steps": 6})
    assert "resum" in parts.output.lower()
    agree(f"sft resumed, {processes} device(s)", parts, whole, {"loss": 0.0, "grad_norm": 0.0})
