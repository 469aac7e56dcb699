"""Unsupported adapters are rejected with a line that names supported ones; nothing is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from megarl.cli import main
from megarl.config.lora import LoraConfig
from megarl.config.preference import RmConfig
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.models.lora import (
    adapted_modules,
    adapter_shapes,
    check_lora,
    num_adapter_parameters,
    possible_targets,
)
from tests.config.rules import GYM, violations
from tests.models.tiny import EXPERTS, LATENT, SIZES
from tests.processes import apart_from_waits

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[0]),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "deepseek_v3": transformers.DeepseekV3Config(**(SIZES | LATENT), q_lora_rank=40),
}


def refusal(directory: Path, family: str, **lora: Any) -> str:
    CONFIGS[family].save_pretrained(directory)
    with pytest.raises(UserError) as error:
        check_lora(load_architecture(directory), LoraConfig(**lora))
    return str(error.value)


def test_rules_that_need_no_model() -> None:
    assert violations(lora={"rank": 4}) == []
    assert violations(lora={"target_modules": ["q_proj", "all-linear"]}) == [
        "lora.target_modules: all-linear excludes other names (got q_proj, all-linear)"
    ]
    assert violations(lora={"target_modules": ["q_proj", "q_proj"]}) == [
        "lora.target_modules: q_proj is listed twice"
    ]
    assert violations(lora={}, router={"bias_update_rate": 1e-3}) == [
        "router.bias_update_rate: not with lora, which freezes the model's weights (got 0.001)"
    ]
    assert violations(RmConfig, lora={}) == [
        "lora: not for reward models: they train all weights and a new head"
    ]


def test_names_of_another_model(tmp_path: Path) -> None:
    assert refusal(tmp_path, "llama", target_modules=["q_proj", "c_attn", "lm_head"]) == (
        f"lora.target_modules: c_attn, lm_head cannot have adapters, {', '.join(LINEAR)} can"
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts(tmp_path: Path, family: str) -> None:
    """Also if some layers are dense: an adapter on those alone would not match the name."""
    assert refusal(tmp_path, family) == (
        "lora.target_modules: all-linear, but experts have no adapters yet; choose among q_proj, k_proj, "
        "v_proj, o_proj"
    )
    assert refusal(tmp_path, family, target_modules=["gate_proj"]) == (
        "lora.target_modules: gate_proj cannot have adapters, q_proj, k_proj, v_proj, o_proj can (experts "
        "have no adapters yet)"
    )
    check_lora(load_architecture(tmp_path), LoraConfig(target_modules=["q_proj", "o_proj"]))


def test_the_command_line_says_it_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIGS["qwen3_moe"].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model")},
        "optimizer": {"lr": 1e-3},
        "data": {"train": GYM},
        "training": {"num_steps": 10, "batch_size": 4},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    asked = ["sft", "--config", str(tmp_path / "sft.yaml"), "--dry-run=full"]
    assert main([*asked, "lora={rank: 4, target_modules: [q_proj, v_proj]}"]) == 0
    assert "trained: adapters of rank 4 on q_proj, v_proj; exported: both" in capsys.readouterr().out
    assert main([*asked, "lora={rank: 4}"]) == 2
    [line] = apart_from_waits(capsys.readouterr().err)
    assert line.startswith("error: lora.target_modules: all-linear, but experts have no adapters yet")
    assert main([*asked, "lora={dropout: 0.1}"]) == 2
    [line] = apart_from_waits(capsys.readouterr().err)
    assert "lora.dropout" in line


def test_latent_attention(tmp_path: Path) -> None:
    assert refusal(tmp_path, "deepseek_v3", target_modules=["o_proj"]) == (
        "lora: deepseek_v3 has latent attention, whose projections have no adapters yet"
    )


def test_shapes_are_the_models(tmp_path: Path) -> None:
    """Against the projections of transformers' own model."""
    CONFIGS["llama"].save_pretrained(tmp_path)
    architecture = load_architecture(tmp_path)
    assert possible_targets(architecture) == LINEAR
    modules = adapted_modules(architecture, LoraConfig())
    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    linear = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    assert modules == {name: (module.out_features, module.in_features) for name, module in linear.items()}
    shapes = adapter_shapes(modules, 3)
    assert len(shapes) == 2 * len(linear)
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (3, 96)
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (64, 3)
    assert num_adapter_parameters(modules, 3) == sum(a * b for a, b in shapes.values())
