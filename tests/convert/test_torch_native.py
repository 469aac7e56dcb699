"""Hugging Face directories to checkpoints of the torch backend and back: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megarl.cli import main
from megarl.weights.hf import safetensors_files


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name, path in safetensors_files(directory).items():
        with safe_open(path, framework="pt") as file:
            found[name] = file.get_tensor(name)
    return found


@pytest.mark.parametrize("name", ["qwen3-moe-mixed-tied", "phi3"])
def test_there_and_back(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.models.tiny import MODELS, save_model
    from tests.trainer.torch.families import save_family

    source, between, target = tmp_path / "hf", tmp_path / "torch", tmp_path / "again"
    (save_model if name in MODELS else save_family)(name, source)
    assert main(["convert", "hf-to-torch", str(source), str(between), "--max-shard-size", "100KB"]) == 0
    assert len(list(between.glob("*.distcp"))) > 2
    assert main(["convert", "torch-to-hf", str(between), str(target), "--max-shard-size", "100KB"]) == 0
    before, after = tensors(source), tensors(target)
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert (target / "config.json").is_file()
    assert main(["convert", "torch-to-hf", str(source), str(tmp_path / "no")]) == 2
    assert "neither a Megatron checkpoint" in capsys.readouterr().err
