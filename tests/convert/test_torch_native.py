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


def test_adapters_are_merged(tmp_path: Path) -> None:
    """As the run itself exports them."""
    import yaml

    from tests.models.tiny import save_model
    from tests.trainer.torch import backend_ranks
    from tests.trainer.world import world

    source, run, target = tmp_path / "hf", tmp_path / "run", tmp_path / "merged"
    save_model("qwen3-tied", source)
    [exported] = world(1).run(backend_ranks.save_adapters, str(source), str(run))
    config = {"model": {"path": str(source)}, "lora": {"rank": 4, "alpha": 6.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["convert", "torch-to-hf", str(run / "checkpoints" / "step_2"), str(target)]) == 0
    found, before = tensors(target), tensors(source)
    assert found.keys() == exported.keys()
    assert all(abs(found[name].numpy() - value).max() < 1e-6 for name, value in exported.items())
    changed = {
        name.rpartition(".")[0].rpartition(".")[2] for name in found if not found[name].equal(before[name])
    }
    assert {"q_proj", "down_proj"} <= changed and "embed_tokens" not in changed


def test_a_run_from_the_hub_is_converted_with_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    from megarl.config import hub
    from megarl.convert.torch_native import hf_to_torch
    from tests.models.tiny import save_model

    snapshot, run = tmp_path / "snapshot", tmp_path / "run"
    save_model("llama-biases", snapshot)
    hf_to_torch(snapshot, run / "checkpoints" / "step_1", dtype=None, max_bytes=10**9)
    for copy in (run / "checkpoints" / "step_1" / "hf").iterdir():
        copy.unlink()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": "org/name"}}))
    fetched = []
    monkeypatch.setattr(hub, "resolve_id", lambda name: hub.HubDirectory(str(snapshot), name))
    monkeypatch.setattr(hub, "fetch", fetched.append)
    target = tmp_path / "hf"
    assert main(["convert", "torch-to-hf", str(run / "checkpoints" / "step_1"), str(target)]) == 0
    assert fetched == [str(snapshot)]
    found, before = tensors(target), tensors(snapshot)
    assert found.keys() == before.keys() and all(found[name].equal(before[name]) for name in found)
