"""Every key of `megarl plan` changes a figure of some plan: what nobody reads is no setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megarl.config.plan import PlanConfig
from megarl.config.section import Section
from megarl.simulate.run import simulate

GPUS = 16
BASE: dict[str, Any] = {
    "trainer": {
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_parallel_size": 2,
        "expert_parallel_size": 2,
    },
    "engine": {"tensor_parallel_size": 2, "kv_cache_gib": 2.0},
    "workload": {"sequence_length": 4096, "tokens_per_microbatch": 16384},
}
# Key -> another value, and what else the comparison is made under.
TORCH = {"dense": True, "trainer.pipeline_parallel_size": 1, "trainer.backend": "torch"}
APART = {"engine.colocated": False, "engine.num_gpus": 8}
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "trainer.backend": ("torch", {"dense": True, "trainer.pipeline_parallel_size": 1}),
    "trainer.replicate_size": (2, TORCH),
    "trainer.reshard_after_forward": (False, TORCH),
    "trainer.reduce_each_microbatch": (True, TORCH),
    "trainer.cpu_offload": (True, TORCH),
    "trainer.tensor_parallel_size": (4, {}),
    "trainer.sequence_parallel": (True, {"dense": True, "trainer.sequence_parallel": False}),
    "trainer.pipeline_parallel_size": (4, {}),
    "trainer.virtual_pipeline_parallel_size": (2, {}),
    "trainer.first_stage_layers": (3, {}),
    "trainer.last_stage_layers": (3, {}),
    "trainer.context_parallel_size": (2, {}),
    "trainer.expert_parallel_size": (1, {}),
    "trainer.expert_tensor_parallel_size": (2, {"trainer.expert_parallel_size": 1}),
    "trainer.distributed_optimizer": (False, {}),
    "trainer.activation_recompute": ("full", {}),
    "trainer.keep_reference": (True, {}),
    "trainer.lora.rank": (16, {"trainer.lora": {"rank": 8, "target_modules": ["q_proj", "o_proj"]}}),
    "trainer.lora.target_modules": (
        ["q_proj"],
        {"trainer.lora": {"rank": 8, "target_modules": ["q_proj", "o_proj"]}},
    ),
    "trainer.num_microbatches": (1, {}),
    "engine.colocated": ({"engine.colocated": False, "engine.num_gpus": GPUS}, {}),
    "engine.num_gpus": (16, APART),
    "engine.tensor_parallel_size": (1, {}),
    "engine.pipeline_parallel_size": (2, {}),
    "engine.data_parallel_size": (2, {"engine.expert_parallel": True}),
    "engine.expert_parallel": (True, {}),
    "engine.kv_cache_gib": (4.0, {}),
    "engine.max_num_seqs": (64, {"engine.kv_cache_gib": None, "engine.max_num_seqs": 32}),
    "workload.sequence_length": (8192, {"engine.kv_cache_gib": None, "engine.max_num_seqs": 32}),
    "workload.tokens_per_microbatch": (8192, {}),
    "weights.offload": (["kv_cache"], {}),
    "dtypes.parameters": ("float32", {}),
    "dtypes.gradients": ("bfloat16", {}),
    "dtypes.moments": ("bfloat16", {}),
    "dtypes.engine": ("float32", {}),
    "dtypes.kv_cache": ("float8", {"engine.kv_cache_gib": None, "engine.max_num_seqs": 32}),
    "gpu.memory_gib": (40.0, {}),
    "gpu.reserved_gib": (12.0, {}),
    "gpu.gpus_per_host": (4, APART | {"engine.tensor_parallel_size": 8}),
    "gpu.memory_gb_s": (1000.0, {"engine.tensor_parallel_size": 1}),
    "gpu.nvlink_gb_s": (100.0, {"engine.tensor_parallel_size": 1}),
    "gpu.network_gb_s": (10.0, APART),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers with experts, by their shape alone; beside them, in ``dense``, some without."""
    path = tmp_path_factory.mktemp("plan") / "model"
    sizes: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    transformers.Qwen3MoeConfig(**sizes, **experts).save_pretrained(path)
    transformers.Qwen3Config(**sizes).save_pretrained(path / "dense")
    return path


def figures(model: Path, changes: dict[str, Any]) -> str:
    """All figures of a plan, as text."""
    values = json.loads(json.dumps(BASE)) | {"model": {"path": str(model)}}
    changes = dict(changes)
    if changes.pop("dense", False):
        values["model"]["path"] = str(model / "dense")
        values["trainer"].pop("expert_parallel_size")
    for key, value in changes.items():
        *sections, name = key.split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    config = PlanConfig.model_validate(values)
    gpus = GPUS * (2 if changes.get("engine.data_parallel_size") else 1)
    found = simulate(config, gpus).as_json()
    del found["config"], found["seconds"]  # what was asked, and how long the planning took
    return json.dumps(found, sort_keys=True)


@pytest.mark.parametrize("key", CHANGES)
def test_it_changes_a_figure(model: Path, key: str) -> None:
    value, under = CHANGES[key]
    changes = value if isinstance(value, dict) else {key: value}
    assert figures(model, under) != figures(model, under | changes)


def test_no_key_is_left_out() -> None:
    def leaves(section: type[Section], at: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
            inner = [p for p in parts if isinstance(p, type) and issubclass(p, Section)]
            found += leaves(inner[0], f"{at}{name}.") if inner else [f"{at}{name}"]
        return found

    assert set(leaves(PlanConfig, "")) == {*CHANGES, "model.path"}
