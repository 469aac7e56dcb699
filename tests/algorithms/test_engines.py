"""What is refused before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.algorithms.engines import start_engine
from megarl.config.model import ModelConfig
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.models import load_architecture


def test_latent_attention_has_no_engine_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    model = ModelConfig(path="configs/models/deepseek_v3_671b")
    with pytest.raises(UserError, match=r"model\.path: .* has latent attention"):
        start_engine(
            model, load_architecture(model.path), EngineConfig(), max_model_len=64, seed=1, log_dir=tmp_path
        )
    assert not list(tmp_path.iterdir())
