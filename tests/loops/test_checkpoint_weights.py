"""Weights for an engine without a trainer: their memory is there until the engine is done with it."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megarl.config.model import ModelConfig
from megarl.loops.evaluation import CheckpointWeights
from megarl.models import load_architecture
from tests.trainer.torch.families import save_family


def test_their_memory_lasts_as_long_as_they_do(tmp_path: Path) -> None:
    save_family("olmo2", tmp_path)
    context: Any = SimpleNamespace()  # of no use for files alone
    weights = CheckpointWeights(
        context, load_architecture(tmp_path, any_family=True), ModelConfig(path=str(tmp_path))
    )
    gc.collect()
    [owner] = weights.owners
    handles: list[Any] = [storage.handle for storage in owner.storages]  # type: ignore[union-attr]
    mapped = [torch.UntypedStorage._new_shared_filename_cpu(*handle) for handle in handles]
    expected = load_file(tmp_path / "model.safetensors")
    assert owner.params.keys() == expected.keys()
    for name, view in owner.params.items():
        found = torch.empty(0, dtype=torch.float32).set_(mapped[view.storage], view.offset, view.shape)
        assert torch.equal(found, expected[name]), name
    del weights, mapped, found
    gc.collect()
    with pytest.raises(RuntimeError, match="shared memory"):
        torch.UntypedStorage._new_shared_filename_cpu(*handles[0])
