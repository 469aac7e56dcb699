"""Every family's table against the tensors that transformers writes for a small model of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.convert.hf_side import HfReader
from megarl.errors import UserError
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models import FAMILIES, load_architecture
from megarl.models.any_family import has_engine_table
from megarl.models.rope import inverse_frequencies
from megarl.weights.boxes import tiling_problem

SIZES: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
DEEPSEEK = MLA | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 24}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, EXPERTS),
    "qwen3_moe dense layers": (transformers.Qwen3MoeConfig, EXPERTS | {"mlp_only_layers": [1]}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "deepseek_v3": (transformers.DeepseekV3Config, DEEPSEEK | {"q_lora_rank": 24}),
    "deepseek_v3 without q_lora": (transformers.DeepseekV3Config, DEEPSEEK | {"q_lora_rank": None}),
    "smollm3": (transformers.SmolLM3Config, {"pad_token_id": 0, "attention_bias": True}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16}),
    "gemma3_text": (transformers.Gemma3TextConfig, {"head_dim": 16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_transformers_writes(name: str, tmp_path: Path) -> None:
    config_class, options = MODELS[name]
    config = config_class(**(SIZES | options))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert load_architecture(tmp_path).hf_shapes() == found


def test_every_family_is_among_them() -> None:
    assert {name.split()[0] for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_both_sides_hold_every_element_of_every_tensor(name: str, tmp_path: Path) -> None:
    """All ranks of a trainer and of an engine, without replicas, tile each tensor."""
    config_class, options = MODELS[name]
    config_class(**(SIZES | options)).save_pretrained(tmp_path)
    table = load_architecture(tmp_path)
    layout = ParallelLayout(tensor=2, expert=2)
    sides = (table.trainer_regions, *([table.engine_regions] if has_engine_table(table) else []))
    assert len(sides) == 2 or name == "smollm3", "which vLLM loads by its own names"
    for regions_of in sides:
        boxes: dict[str, set[tuple[tuple[int, int], ...]]] = {}
        for rank in range(2):
            for region in regions_of(layout, layout.coordinates(rank)):
                boxes.setdefault(region.hf, set()).add(region.box)
        assert boxes.keys() == table.hf_shapes().keys()
        for hf, shape in table.hf_shapes().items():
            assert tiling_problem(tuple((0, n) for n in shape), tuple(boxes[hf])) is None, hf


ENGINE_NAMES = {
    "deepseek_v3": """input_layernorm post_attention_layernorm self_attn.fused_qkv_a_proj
        self_attn.q_a_layernorm self_attn.q_b_proj self_attn.kv_a_layernorm self_attn.kv_b_proj
        self_attn.o_proj mlp.gate mlp.shared_experts.gate_up_proj mlp.shared_experts.down_proj""",
    "deepseek_v3 without q_lora": """input_layernorm post_attention_layernorm self_attn.kv_a_proj_with_mqa
        self_attn.q_proj self_attn.kv_a_layernorm self_attn.kv_b_proj
        self_attn.o_proj mlp.gate mlp.shared_experts.gate_up_proj mlp.shared_experts.down_proj""",
    "gemma2": """input_layernorm post_attention_layernorm pre_feedforward_layernorm
        post_feedforward_layernorm self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj""",
    "gemma3_text": """input_layernorm post_attention_layernorm pre_feedforward_layernorm
        post_feedforward_layernorm self_attn.qkv_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm
        mlp.gate_up_proj mlp.down_proj""",
}
"""Modules with a weight in layer 1, read in vLLM 0.32's deepseek_v2.py, gemma2.py and gemma3.py."""


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_engine_names_are_vllms(name: str, tmp_path: Path) -> None:
    config_class, options = MODELS[name]
    config_class(**(SIZES | options)).save_pretrained(tmp_path)
    regions = load_architecture(tmp_path).engine_regions(ParallelLayout(), RankCoordinates())
    layer = "model.layers.1."
    found = {r.param.removeprefix(layer) for r in regions if r.param.startswith(layer)}
    expected = {f"{module}.weight" for module in ENGINE_NAMES[name].split()}
    if name.startswith("deepseek"):
        expected |= {"mlp.gate.e_score_correction_bias"}
        expected |= {f"mlp.experts.routed_experts.{part}_weight" for part in ("w13", "w2")}
    assert found == expected


def test_latents_are_fused_in_the_engine_only(tmp_path: Path) -> None:
    config_class, options = MODELS["deepseek_v3"]
    config_class(**(SIZES | options)).save_pretrained(tmp_path)
    table, layout = load_architecture(tmp_path), ParallelLayout(tensor=2)
    at = layout.coordinates(1)
    rows = {
        r.hf: r
        for r in table.engine_regions(layout, at)
        if r.param.endswith("2.self_attn.fused_qkv_a_proj.weight")
    }
    prefix = "model.layers.2.self_attn."
    assert rows[f"{prefix}q_a_proj.weight"].index == ((0, 24), (0, 64))
    assert rows[f"{prefix}kv_a_proj_with_mqa.weight"].index == ((24, 44), (0, 64))
    heads = {r.hf: r.box for r in table.trainer_regions(layout, at)}
    assert heads[f"{prefix}kv_b_proj.weight"] == ((28, 56), (0, 16)), "heads 2 and 3, 8 + 6 rows each"
    assert heads[f"{prefix}o_proj.weight"] == ((0, 64), (12, 24))


def test_layers_of_multi_token_prediction_are_ignored(tmp_path: Path) -> None:
    config_class, options = MODELS["deepseek_v3"]
    config_class(**(SIZES | options)).save_pretrained(tmp_path)
    table = load_architecture(tmp_path)
    assert table.ignores("model.layers.3.eh_proj.weight")
    assert not any(table.ignores(name) for name in table.hf_shapes())
    assert not table.ignores("model.layers.30.eh_proj.weight")


def test_rotary_frequencies_in_a_checkpoint_need_no_rule(tmp_path: Path) -> None:
    """Llama 2's published files have them; what is beside them is still missed."""
    config_class, options = MODELS["llama"]
    config = config_class(**(SIZES | options))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    save_file(tensors | frequencies, tmp_path / "model.safetensors")
    table = load_architecture(tmp_path)
    reader = HfReader(tmp_path, table)
    assert reader.ignored == []
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(reader.read(name), tensors[name])
    save_file(tensors | {"model.layers.0.self_attn.freq": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no rule maps tensor model\.layers\.0\.self_attn\.freq$"):
        HfReader(tmp_path, table)


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"beta_fast": 16, "beta_slow": 2},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"attention_factor": 1.5},
    ],
)
def test_yarn_is_transformers(extra: dict[str, Any], tmp_path: Path) -> None:
    sizes = SIZES | {"max_position_embeddings": 163_840, "head_dim": 64, "rope_parameters": YARN | extra}
    config = transformers.Qwen3Config(**sizes)
    config.save_pretrained(tmp_path)
    rope = load_architecture(tmp_path).spec.rope
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope, 64), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-12)


def test_what_the_trainer_cannot_build_says_so(tmp_path: Path) -> None:
    for name in ("gemma2", "gemma3_text"):
        config_class, options = MODELS[name]
        config_class(**(SIZES | options)).save_pretrained(tmp_path)
        assert load_architecture(tmp_path).spec.not_trainable


def test_latent_attention_refuses_what_the_engine_would_ignore(tmp_path: Path) -> None:
    config_class, options = MODELS["deepseek_v3"]
    config_class(**(SIZES | options)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_interleave": False}))
    with pytest.raises(UserError, match="rope_interleave False is not supported"):
        load_architecture(tmp_path)
