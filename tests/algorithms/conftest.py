"""A tiny model for learner tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny import save_model


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied model with qk-norm."""
    folder: Path = tmp_path_factory.mktemp("models")
    save_model("qwen3-tied", folder / "qwen3-tied")
    return {"qwen3-tied": str(folder / "qwen3-tied")}
