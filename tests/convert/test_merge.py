"""`megarl merge` against PEFT's own merge of the same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megarl.cli import main

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merge") / "base"
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).save_pretrained(path)
    (path / "tokenizer_config.json").write_text("{}")
    return path


def with_adapter(base: Path, target: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of random matrices; return PEFT's merged weights."""
    import peft

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    adapted.save_pretrained(target)
    return {name: value.clone() for name, value in adapted.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": ["k_proj", "gate_proj"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_it_is_what_peft_merges(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    expected = with_adapter(base, tmp_path / "run" / "adapter", **options)
    plain = load_file(base / "model.safetensors")
    command = ["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--max-shard-size", "20KB"]
    assert main(command) == 0
    found: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == plain.keys()
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    targets = options.get("target_modules", ["q_proj", "down_proj"])
    assert len(changed) == 2 * len(targets)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    # It is a model: transformers finds the same weights through the index.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_what_cannot_be_merged(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    with_adapter(base, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def refusal(*options: str, **changes: Any) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        assert main(["merge", str(adapter), str(tmp_path / "merged"), *options]) == 2
        assert not (tmp_path / "merged").exists()
        return capsys.readouterr().err

    assert "use_dora: only False can be merged (got True)" in refusal(use_dora=True)
    assert "base_model_name_or_path: no such directory (got 'nowhere'); --base DIR names it" in refusal(
        base_model_name_or_path="nowhere"
    )
    assert f"--base: {tmp_path}: no config.json in it" in refusal("--base", str(tmp_path))
    assert "no such directory (got '')" in refusal(base_model_name_or_path=None)
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight: expected shape (2, 48), has (4, 48)"
    assert first in refusal(rank_pattern={"down_proj": 2})
    assert main(["merge", str(base), str(tmp_path / "merged")]) == 2
    assert "no adapter (adapter_config.json) in it or in its folder adapter" in capsys.readouterr().err
