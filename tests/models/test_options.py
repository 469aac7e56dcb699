"""Keys of config.json: each is read as in transformers, has no effect, or is rejected by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.models.options import DEFAULTS, HARMLESS, NEUTRAL, NOT_COMPUTED, READ
from tests.models.test_families import MODELS, SIZES

FAMILIES = {name: MODELS[name] for name in MODELS if " " not in name}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    config_class, options = FAMILIES[family]
    return json.loads(config_class(**(SIZES | options)).to_json_string(use_diff=False)) | changes


def spec_of(directory: Path, config: dict[str, Any]) -> Any:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").touch()  # a directory with weights, which nothing here reads
    return load_architecture(directory).spec


def spec_or_error(directory: Path, config: dict[str, Any]) -> Any:
    try:
        return spec_of(directory, config)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_family_s_class_is_known(family: str):
    keys = set(FAMILIES[family][0]().to_dict())
    assert keys - READ[family] - HARMLESS - NOT_COMPUTED.get(family, set()) - NEUTRAL.keys() == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_is_what_transformers_takes(family: str, tmp_path: Path):
    config_class, _ = FAMILIES[family]
    whole = config_of(family)
    compared = 0
    for key in whole.keys() & (READ[family] | NEUTRAL.keys()):
        rest = {name: value for name, value in whole.items() if name != key}
        ours = spec_or_error(tmp_path, rest)
        if isinstance(ours, str):
            assert f"field {key!r} is missing" in ours
            continue
        filled = json.loads(config_class(**rest).to_json_string(use_diff=False))
        assert ours == spec_of(tmp_path, filled), key
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_class(family: str):
    defaults = FAMILIES[family][0]()
    theirs = defaults.to_dict() | {"rope_theta": (defaults.rope_parameters or {}).get("rope_theta")}
    assert DEFAULTS[family] == {key: theirs[key] for key in DEFAULTS[family]}


OTHER: dict[str, Any] = {
    "tie_word_embeddings": lambda value: not value,
    "attention_bias": lambda value: not value,
    "mlp_bias": lambda value: not value,
    "norm_topk_prob": lambda value: not value,
    "rope_parameters": lambda value: value | {"rope_theta": 123.0},
    "mlp_only_layers": lambda value: [0] if not value else [],
    "head_dim": lambda value: 2 * (value or 16),
    "q_lora_rank": lambda value: None if value else 8,
    "sliding_window": lambda value: 8,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_read_has_an_effect(family: str, tmp_path: Path):
    config = config_of(family)
    for key in config.keys() & READ[family]:
        if (family, key) in {
            ("deepseek_v3", "head_dim"),  # the sizes of a latent head are named apart
            ("deepseek_v3", "num_nextn_predict_layers"),  # says which tensors are left out
            ("gemma3_text", "rope_parameters"),  # by layer type
            ("mixtral", "intermediate_size"),
            ("smollm3", "no_rope_layer_interval"),  # counts without no_rope_layers alone
        }:
            continue
        change = OTHER.get(key, lambda value: value * 2)
        changed = spec_or_error(tmp_path, config | {key: change(config[key])})
        assert changed != spec_of(tmp_path, config), key


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("gemma")])
def test_a_harmless_key_changes_no_logits_of_transformers(family: str, tmp_path: Path):
    config_class, _ = FAMILIES[family]
    values = {"pretraining_tp": 2, "use_cache": False, "output_router_logits": True, "max_window_layers": 1}
    values |= {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7, "output_attentions": True}
    config = config_of(family)
    ids = torch.tensor([[3, 9, 27, 81, 243, 4]])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**config)).eval()
    expected = model(ids).logits
    changed = {key: value for key, value in values.items() if key in config and key in HARMLESS}
    other = transformers.AutoModelForCausalLM.from_config(config_class(**(config | changed))).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, expected)
    assert spec_of(tmp_path, config | changed) == spec_of(tmp_path, config)


EVERY_FAMILY = {
    "hidden_dropout_prob": 0.1,
    "attention_dropout": 0.1,
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "partial_rotary_factor": 0.5,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "clip_qkv": 8.0,
    "chunk_size_feed_forward": 16,
    "is_encoder_decoder": True,
    "use_bidirectional_attention": True,
    "attention_chunk_size": 8192,
    "no_rope_layers": [1, 1, 0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
}
TRAINABLE = {
    "hidden_act": "gelu",
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "use_sliding_window": True,
}
ONE_FAMILY = [
    ("mistral", "sliding_window", 255),
    ("qwen2", "hidden_act", "gelu_pytorch_tanh"),
    ("llama", "hidden_act", "relu"),
    ("llama", "use_qk_norm", True),
    ("qwen3", "mlp_bias", True),
    ("mixtral", "attention_bias", True),
    ("mixtral", "router_jitter_noise", 0.1),
    ("deepseek_v3", "attention_bias", True),
    ("deepseek_v3", "rope_interleave", False),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "moe_layer_freq", 2),
    ("gemma2", "hidden_activation", "relu"),
    ("gemma3_text", "hidden_activation", "gelu"),
    ("qwen3_moe", "shared_expert_intermediate_size", 64),
]


def refusals() -> list[tuple[str, str, Any]]:
    found = [(family, key, value) for family in FAMILIES for key, value in EVERY_FAMILY.items()]
    found.remove(("smollm3", "no_rope_layers", EVERY_FAMILY["no_rope_layers"]))
    for family in FAMILIES:
        for key, value in TRAINABLE.items():
            windowed = key == "sliding_window" and family.startswith(("qwen", "mistral", "smollm3"))
            if not family.startswith("gemma") and not windowed:
                found.append((family, key, value))
    return [*found, *ONE_FAMILY]


@pytest.mark.parametrize(("family", "key", "value"), refusals())
def test_an_option_that_is_not_built_is_refused_by_name(family: str, key: str, value: Any, tmp_path: Path):
    with pytest.raises(UserError, match=rf"config\.json: {key}[ .].*not supported"):
        spec_of(tmp_path, config_of(family, **{key: value}))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "swish", "attention_dropout": 0.0, "sliding_window": None}),
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21}),
        ("qwen3", {"layer_types": ["full_attention"] * 3, "partial_rotary_factor": 1.0}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 256}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}),
        ("llama", {"unsloth_version": "2025.1", "_attn_implementation_autoset": True}),
    ],
)
def test_what_says_the_usual_is_accepted(family: str, changes: dict[str, Any], tmp_path: Path):
    assert spec_of(tmp_path, config_of(family, **changes)) == spec_of(tmp_path, config_of(family))


def test_layers_without_rotation_are_those_of_transformers(tmp_path: Path):
    """By the list, or by the interval; what fits neither is a line."""
    base = config_of("smollm3", num_hidden_layers=6)
    for change in ({}, {"no_rope_layer_interval": 3}, {"no_rope_layers": [0, 1, 1, 0, 1, 1]}):
        config = {
            name: value for name, value in base.items() if name not in ("no_rope_layers", "layer_types")
        }
        theirs = transformers.SmolLM3Config(**(config | change)).no_rope_layers
        expected = tuple(layer for layer, rotates in enumerate(theirs) if not rotates)
        assert expected and spec_of(tmp_path, config | change).unrotated_layers == expected
    for bad in ([1, 1], [1, 1, 1, 2, 1, 1], "all"):
        with pytest.raises(UserError, match=r"no_rope_layers must have a 0 or 1 for each of 6 layers"):
            spec_of(tmp_path, base | {"no_rope_layers": bad})


def test_a_plan_is_made_of_a_configuration_whose_weights_would_be_refused(tmp_path: Path):
    """DeepSeek-V3's own config.json says fp8; a layout is planned from it alone."""
    config = config_of("deepseek_v3")
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    planned = load_architecture(tmp_path).spec
    assert planned == spec_of(tmp_path, config)
