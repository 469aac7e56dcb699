"""Megatron models filled through the tables against Hugging Face's own: logits, and the way back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megarl.errors import UserError
from megarl.models import load_architecture
from tests.models.tiny import MODELS, VOCAB, hf_logits, save_model
from tests.trainer import ranks
from tests.trainer.world import world

LENGTHS = (17, 5, 100, 1, 17, 41)


def check_export(source: Path, exported: Path) -> None:
    """Bit for bit the same tensors and settings, and all tokenizer files."""
    before, after = load_file(source / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (exported / "config.json").read_text()
    )
    assert (exported / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_hf_and_the_model_comes_back(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"\x00any bytes\n")
    draw = random.Random(0)
    sequences = [[draw.randrange(VOCAB) for _ in range(n)] for n in LENGTHS]
    arguments = (str(tmp_path / "model"), sequences, str(tmp_path / "exported"), "float32")
    [logits] = world(1).run(ranks.logits_and_export, *arguments)
    with torch.no_grad():
        expected = torch.cat([hf_logits(model, s) for s in sequences]).numpy()
    assert np.std(expected) > 0.2, "logits near 0 would agree whatever happens"
    assert np.abs(logits - expected).max() < 1e-5
    check_export(tmp_path / "model", tmp_path / "exported")


def test_bfloat16_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "model"
    model = save_model("qwen2-tied", source)
    model.to(torch.bfloat16).save_pretrained(source)
    (source / "tokenizer.json").write_bytes(b"{}")
    world(1).run(ranks.logits_and_export, str(source), [], str(tmp_path / "exported"), "bfloat16")
    check_export(source, tmp_path / "exported")
    assert next(iter(load_file(source / "model.safetensors").values())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported .*nearest is llama"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
    ],
)
def test_a_config_that_is_not_supported_says_why(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    } | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_architecture(tmp_path)


def test_rope_of_transformers_4_reads_the_same(tmp_path: Path) -> None:
    """rope_theta and rope_scaling at the top, as in checkpoints written before transformers 5."""
    base = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    specs = []
    for extra in (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(base | extra))
        specs.append(load_architecture(tmp_path).spec.rope)
    assert specs[0] == specs[1]
    assert (specs[0].theta, specs[0].kind, specs[0].factor) == (5e5, "llama3", 8.0)
