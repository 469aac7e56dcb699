"""`megarl convert` and `megarl merge` of models and adapters named by their hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.cli import main
from tests.hub.server import FakeHub
from tests.models.tiny import save_model

Q = "model.layers.0.self_attn.q_proj"


def upload(hub: FakeHub, repository: str, branch: str, directory: Path) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    hub.files.setdefault(repository, {})[branch] = files


@pytest.fixture
def weights(hub: FakeHub, tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two revisions of org/base, whose weights differ; revision -> weights."""
    save_model("llama", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    found = {"main": load_file(file)}
    upload(hub, "org/base", "main", tmp_path / "hf")
    found["v1"] = {name: value * 2 for name, value in found["main"].items()}
    save_file(found["v1"], file, metadata={"format": "pt"})
    upload(hub, "org/base", "v1", tmp_path / "hf")
    return found


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_an_id_is_a_source(weights: Any, revision: str, tmp_path: Path) -> None:
    source = "org/base" if revision == "main" else f"org/base@{revision}"
    assert main(["convert", "hf-to-megatron", source, "between"]) == 0
    assert main(["convert", "megatron-to-hf", "between", "again", "--hf-config", source]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights[revision].keys()
    assert all(torch.equal(again[name], value) for name, value in weights[revision].items())


def adapter_of(hub: FakeHub, directory: Path, q: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Upload an adapter of rank 1 on one matrix as org/adapter; return what it adds."""
    directory.mkdir()
    a, b = torch.ones(1, q.shape[1]), torch.ones(q.shape[0], 1)
    save_file(
        {f"base_model.model.{Q}.lora_{name}.weight": value for name, value in (("A", a), ("B", b))},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["q_proj"], **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    upload(hub, "org/adapter", "main", directory)
    return 3 * b @ a


@pytest.mark.parametrize("revision", [None, "v1"])
def test_an_adapter_is_merged_with_the_revision_of_its_base(
    hub: FakeHub, weights: Any, revision: str | None, tmp_path: Path
) -> None:
    before = weights[revision or "main"]
    added = adapter_of(
        hub,
        tmp_path / "adapter",
        before[f"{Q}.weight"],
        base_model_name_or_path="org/base",
        revision=revision,
    )
    assert main(["merge", "org/adapter", "merged"]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[f"{Q}.weight"], before[f"{Q}.weight"] + added)
    others = before.keys() - {f"{Q}.weight"}
    assert all(torch.equal(merged[name], before[name]) for name in others)
    # --base replaces it, revision included.
    assert main(["merge", "org/adapter", "other", "--base", "org/base@main"]) == 0
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert torch.equal(other[f"{Q}.weight"], weights["main"][f"{Q}.weight"] + added)


def test_refusals_name_the_argument(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before torch is imported, and nothing is written."""

    def refusal(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / ".metadata").write_text("")
    assert refusal("convert", "hf-to-torch", "nope", "x") == "SOURCE: no such directory (got 'nope')"
    assert "SOURCE: no such directory (got 'org/none'), and as an id of the hub" in refusal(
        "convert", "hf-to-megatron", "org/none", "x"
    )
    assert "has no revision 'v9'" in refusal("convert", "hf-to-megatron", "org/tiny@v9", "x")
    assert refusal("convert", "hf-to-megatron", "ckpt", "x").endswith("torch-to-hf reads it")
    assert refusal("convert", "megatron-to-hf", "model", "x").endswith("hf-to-torch reads it")
    assert refusal("convert", "megatron-to-hf", "nope", "x") == "SOURCE: no such directory (got 'nope')"
    assert refusal("convert", "megatron-to-hf", "ckpt", "x", "--hf-config", "no").startswith(
        "--hf-config: no such"
    )
    assert refusal("merge", "nope", "x") == "RUN_OR_ADAPTER: no such directory (got 'nope')"
    assert "RUN_OR_ADAPTER: org/tiny: no adapter" in refusal("merge", "org/tiny", "x")
    assert refusal("chat", "a/b/c") == "RUN_OR_MODEL: no such directory (got 'a/b/c')"
    assert not (tmp_path / "x").exists()
