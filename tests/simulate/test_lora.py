"""Planned memory of a run with adapters against the buffers that a real one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.plan import PlanConfig
from megarl.errors import UserError
from megarl.simulate.run import simulate
from tests.models.tiny import save_model
from tests.trainer import lora_ranks
from tests.trainer.world import world

LORA = {"rank": 4, "target_modules": ["all-linear"]}


def plan(model_dir: Path, trainer: dict[str, Any]) -> PlanConfig:
    return PlanConfig.model_validate(
        {
            "model": {"path": str(model_dir)},
            "trainer": {"distributed_optimizer": False, "keep_reference": True} | trainer,
            "engine": {"kv_cache_gib": 0.1},
            "workload": {"sequence_length": 64, "tokens_per_microbatch": 96},
            "dtypes": {"parameters": "float32", "engine": "float32"},
        }
    )


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor_parallel_size": 2, "sequence_parallel": True}], ids=["one", "tp2-sp"]
)
def test_memory_is_what_a_run_has(tmp_path: Path, parallel: dict[str, Any]) -> None:
    save_model("llama", tmp_path)
    size = parallel.get("tensor_parallel_size", 1)
    found = world(size).run(lora_ranks.memory, str(tmp_path), LORA, parallel=parallel)
    gpus = simulate(plan(tmp_path, parallel | {"lora": LORA}), size).gpus
    whole = simulate(plan(tmp_path, parallel), size).gpus
    for gpu, other, real in zip(gpus, whole, found, strict=True):
        assert gpu.gradients == 4 * real["gradients"]
        assert gpu.optimizer == 4 * real["optimizer"]
        assert gpu.parameters == 4 * (real["parameters"] + real["gradients"])
        assert gpu.merged == 4 * real["adapted"]
        assert gpu.reference == 0
        assert other.reference == other.parameters == 4 * real["parameters"]
        assert gpu.engine_parameters == other.engine_parameters


def test_experts_are_refused(tmp_path: Path) -> None:
    save_model("qwen3-moe", tmp_path)
    with pytest.raises(UserError, match=r"^trainer\.lora\.target_modules: all-linear, but experts"):
        simulate(plan(tmp_path, {"lora": LORA}), 1)
