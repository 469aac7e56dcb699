"""Checks of load_config on files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.errors import UserError

SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
CONFIG: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "model"},
    "optimizer": {"lr": 1e-3},
    "data": {
        "train": {"source": "jsonl", "path": "train.jsonl"},
        "held_out": {"source": "jsonl", "path": "test.jsonl"},
    },
    "rollout": {"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 16},
    "training": {"num_steps": 10},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("")
    return tmp_path


def lines(*overrides: str) -> list[str]:
    try:
        load_config(GrpoConfig, "c.yaml", overrides)
    except UserError as error:
        return [line.split(" [")[0] for line in str(error).splitlines()]
    return []


def test_complete(folder: Path) -> None:
    assert lines() == []


def test_missing_files_come_with_the_other_mistakes(folder: Path) -> None:
    assert lines("model.path=none", "data.train.path=no.jsonl", "optimizer.lr=x") == [
        "optimizer.lr: expected a number > 0 (got 'x')",
        f"data.train.path: no such file (got 'no.jsonl'), relative to {folder}",
        f"model.path: no such directory (got 'none'), relative to {folder}",
    ]


def test_absolute_path(folder: Path) -> None:
    assert lines("model.path=/none") == ["model.path: no such directory (got '/none')"]


def test_empty_data_and_run_directory(folder: Path) -> None:
    (folder / "test.jsonl").write_text("")
    assert lines("run.dir=c.yaml") == [
        "data.held_out.path: the file is empty (got 'test.jsonl')",
        "run.dir: is a file, not a directory (got 'c.yaml')",
    ]


def test_incomplete_model(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / "model" / name).unlink()
    assert lines() == [
        "model.path: the directory lacks config.json, a tokenizer (tokenizer.json), weights (*.safetensors) "
        "(got 'model')"
    ]


def test_missing_shard(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "model-1-of-2.safetensors")
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = folder / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert lines() == ["model.path: the directory lacks model-2-of-2.safetensors (got 'model')"]
    index.write_text("[")
    assert lines() == [
        "model.path: the directory lacks a readable model.safetensors.index.json "
        "(model/model.safetensors.index.json:1: not valid JSON: Expecting value) (got 'model')"
    ]


def test_broken_config_json(folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{")
    (line,) = lines()
    assert line.startswith("model.path: model/config.json:1: not valid JSON: ")


def test_lengths_against_the_model(folder: Path) -> None:
    assert lines("packing.max_sequence_length=129") == [
        "packing.max_sequence_length: the model has max_position_embeddings = 128 (got 129)"
    ]
    assert lines("rollout.max_new_tokens=128") == [
        "rollout.max_new_tokens: leaves no room for a prompt within the model's "
        "max_position_embeddings = 128 "
        "(got 128)"
    ]
    assert lines("rollout.max_new_tokens=127") == []


def test_kv_cache_against_the_model(folder: Path) -> None:
    # 2 (k, v) * 3 layers * 2 heads * 16 numbers * 4 bytes * 128 tokens = 98,304 bytes
    (folder / "model" / "config.json").write_text(json.dumps(SIZES | {"hidden_size": 64}))
    assert lines(f"rollout.engine.kv_cache_gib={98304 / 2**30}") == []
    (line,) = lines(f"rollout.engine.kv_cache_gib={98303 / 2**30}")
    assert line.startswith("rollout.engine.kv_cache_gib: one sequence of 128 tokens takes 0.00 GiB; raise it")
    half = f"rollout.engine.kv_cache_gib={49152 / 2**30}"
    assert len(lines(half)) == 1
    assert lines(half, "packing.max_sequence_length=64") == []
    assert lines(half, "rollout.engine.dtype=bfloat16") == []
