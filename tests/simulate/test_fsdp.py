"""The plan of a torch trainer against real ones: what each rank holds, gathers and reduces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.plan import PlanConfig
from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.simulate.fsdp import collectives, owners_of, rank_memory
from megarl.simulate.layouts import Layouts
from tests.models.tiny import save_model
from tests.trainer.torch import backend_ranks
from tests.trainer.world import world

# Ranks of tensor and data parallelism, and the section trainer.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "fsdp2": (1, 2, {}),
    "replicas2": (1, 2, {"replicate_size": 2}),
    "tp2": (2, 1, {}),
    "whole-layers": (1, 2, {"reshard_after_forward": False}),
}


def planned(name: str, tensor: int, data: int, trainer: dict[str, Any]) -> tuple[PlanConfig, Layouts]:
    layout = ParallelLayout(tensor=tensor, data=data)
    config = PlanConfig.model_validate(
        {
            "model": {"path": name},
            "trainer": {"backend": "torch", "tensor_parallel_size": tensor, "num_microbatches": 1, **trainer},
            "engine": {"kv_cache_gib": 1.0},
            "workload": {"sequence_length": 64, "tokens_per_microbatch": 64},
            "dtypes": {"parameters": "float32", "engine": "float32"},
        }
    )
    return config, Layouts(layout, layout, 1, colocated=True)


MODELS = ("llama-biases", "qwen3-moe-mixed-tied")
QUICK = (("qwen3-moe-mixed-tied", "fsdp2"), ("qwen3-moe-mixed-tied", "tp2"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=[] if (model, name) in QUICK else pytest.mark.slow)
        for model in MODELS
        for name in ("fsdp2", "replicas2", "tp2")
    ],
)
def test_ranks_hold_what_the_plan_says(tmp_path: Path, model: str, name: str) -> None:
    tensor, data, trainer = LAYOUTS[name]
    save_model(model, tmp_path)
    architecture = load_architecture(tmp_path)
    config, layouts = planned(str(tmp_path), tensor, data, trainer)
    parallel = {"tensor_parallel_size": tensor, "num_processes": tensor * data}
    found = world(tensor * data).run(backend_ranks.held, str(tmp_path), trainer, parallel=parallel)
    for owner, held in zip(owners_of(config, architecture, layouts), found, strict=True):
        assert {(region.hf, region.box) for region in owner.regions} == held["boxes"]
    memory = rank_memory(config, architecture, layouts)
    assert memory.parameters == max(held["parameters"] for held in found)
    assert memory.optimizer == max(held["optimizer"] for held in found)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("whole-layers", marks=pytest.mark.slow)])
def test_a_step_gathers_and_reduces_what_the_plan_says(tmp_path: Path, name: str) -> None:
    """FSDP pads rows to equal parts, which the sizes here need almost none of."""
    tensor, data, trainer = LAYOUTS[name]
    save_model("llama-biases", tmp_path)
    config, layouts = planned(str(tmp_path), tensor, data, trainer)
    expected = collectives(config, load_architecture(tmp_path), layouts)
    assert expected is not None
    for found in world(2).run(backend_ranks.gathered, str(tmp_path), trainer, parallel={"num_processes": 2}):
        assert found["gathered"] == pytest.approx(expected.gathered, rel=0.02)
        assert found["reduced"] == pytest.approx(expected.reduced, rel=0.02)
