"""Tiny models shared by the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

NAMES = (
    *("qwen3-tied", "llama-biases", "mistral", "smollm3", "llama-deep-tied"),
    *("qwen3-moe", "qwen3-moe-mixed-tied", "deepseek-v3"),
)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied one with qk-norm, an untied one with biases, Mistral, SmolLM3, one of four layers, three of
    experts."""
    from tests.models.tiny import save_model  # transformers, which the tests for a GPU do without

    folder: Path = tmp_path_factory.mktemp("models")
    for name in NAMES:
        save_model(name, folder / name)
    return {name: str(folder / name) for name in NAMES}
