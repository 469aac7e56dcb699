"""A hub with one model."""

from __future__ import annotations

import json

import pytest

from megarl.config import hub as hub_ids
from tests.hub.server import ask, serve

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "original/params.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model, and an empty cache."""
    with serve() as running:
        ask(running.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "a-token")
        monkeypatch.delenv(hub_ids.COMMITS, raising=False)
        monkeypatch.chdir(tmp_path)
        running.files["org/tiny"] = {"main": dict(FILES)}
        yield running
