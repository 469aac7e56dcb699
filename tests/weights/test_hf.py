"""Loading and exporting Hugging Face directories: all mismatches are named at once, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.weights import hf
from megarl.weights.hf import export_hf, load_hf, region_index, safetensors_files

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_model(directory: Path, *, tied: bool = False) -> dict[str, torch.Tensor]:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    torch.manual_seed(0)
    shapes = load_architecture(directory).hf_shapes()
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors


def load(directory: Path) -> dict[str, torch.Tensor]:
    """Parameters of one rank, shaped by the outermost index of their regions (vocabulary: 128 rows)."""
    architecture = load_architecture(directory)
    regions = architecture.trainer_regions(ParallelLayout(), ParallelLayout().coordinates(0))
    shapes: dict[str, list[int]] = {}
    for region in regions:
        stops = [stop for _, stop in region.index]  # type: ignore[misc]
        shapes[region.param] = [
            max(pair) for pair in zip(stops, shapes.get(region.param, stops), strict=True)
        ]
    for name in shapes:
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            shapes[name][0] = 128
    params = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    load_hf(directory, architecture, regions, params)
    return params


def tensors_of(directory: Path, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    architecture = load_architecture(directory)
    whole = {name: torch.empty(shape) for name, shape in architecture.hf_shapes().items()}
    for region in architecture.trainer_regions(ParallelLayout(), ParallelLayout().coordinates(0)):
        box = tuple(slice(*span) for span in region.box)
        whole[region.hf][box] = params[region.param][region_index(region.index)]
    return whole


def test_in_and_out_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_model(tmp_path / "in")
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in carried:
        (tmp_path / "in" / name).write_text(f"text of {name}")
    (tmp_path / "in" / "README.md").write_text("stays behind")
    params = load(tmp_path / "in")
    padding = params["embedding.word_embeddings.weight"][100:]
    assert torch.equal(padding, torch.zeros(28, 16))

    monkeypatch.setattr(hf, "_MAX_SHARD_BYTES", 8000)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("from an earlier export")
    whole = tensors_of(tmp_path / "in", params)
    export_hf(out, tmp_path / "in", load_architecture(tmp_path / "in"), iter(whole.items()))

    files = safetensors_files(out)
    assert len(set(files.values())) > 3
    back = {name: load_file(path)[name] for name, path in files.items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    for path in set(files.values()):
        size = sum(t.numel() * 4 for t in load_file(path).values())
        assert size <= 8000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    for name in carried:
        assert (out / name).read_text() == f"text of {name}"
    written = json.loads((out / "config.json").read_text())
    assert written.pop("dtype") == "float32"
    assert written == {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | {"tie_word_embeddings": False}
    left = {path.name for path in out.iterdir()} - set(carried) - {path.name for path in files.values()}
    assert left == {"config.json", "model.safetensors.index.json"}
    assert not (tmp_path / "out.partial").exists()

    again = load(out)  # a sharded directory reads like a single file
    assert all(torch.equal(again[name], params[name]) for name in params)


def test_an_export_that_fails_leaves_the_old_directory(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in")
    write_model(tmp_path / "out")
    short = iter([(EMBEDDING, tensors[EMBEDDING]), ("model.extra", torch.zeros(1))])
    with pytest.raises(UserError) as caught:
        export_hf(tmp_path / "out", tmp_path / "in", load_architecture(tmp_path / "in"), short)
    assert "missing tensor model.norm.weight" in str(caught.value)
    assert "no rule maps tensor model.extra" in str(caught.value)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_missing_left_over_and_misshapen_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)
    tensors[HEAD] = torch.zeros(101, 16)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "in")
    where = str(tmp_path / "in")
    assert set(str(caught.value).splitlines()) == {
        f"{where}: missing tensor model.layers.1.mlp.up_proj.weight",
        f"{where}: missing tensor model.norm.weight",
        f"{where}: no rule maps tensor model.layers.0.self_attn.q_norm.weight",
        f"{where}: no rule maps tensor model.layers.2.mlp.up_proj.weight",
        f"{where}: tensor lm_head.weight has shape [101, 16], expected [100, 16]",
        f"{where}: tensor model.layers.0.self_attn.k_proj.weight has shape [16, 16], expected [8, 16]",
    }


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_change_it(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in", tied=True)
    assert HEAD not in tensors
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / "in" / "model.safetensors")
    params = load(tmp_path / "in")
    assert torch.equal(params["embedding.word_embeddings.weight"][:100], tensors[EMBEDDING])

    other = tensors[EMBEDDING].clone()
    other[7, 3] += 1e-3
    save_file(tensors | {HEAD: other}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path / "in")

    del tensors[EMBEDDING]
    save_file(tensors | {HEAD: other}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing tensor model\.embed_tokens\.weight"):
        load(tmp_path / "in")


def test_a_parameter_no_tensor_fills_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    architecture = load_architecture(tmp_path / "in")
    regions = architecture.trainer_regions(ParallelLayout(), ParallelLayout().coordinates(0))
    params = load(tmp_path / "in")
    params["decoder.layers.0.mlp.router.weight"] = torch.ones(3, 5)
    del params["decoder.final_layernorm.weight"]
    with pytest.raises(UserError) as caught:
        load_hf(tmp_path / "in", architecture, regions, params)
    lines = str(caught.value).splitlines()
    assert lines == [
        "table: tensor model.norm.weight belongs in parameter decoder.final_layernorm.weight, "
        "which does not exist",
        "table: 15 of 15 elements of parameter decoder.layers.0.mlp.router.weight have no tensor",
    ]
    assert torch.equal(params["decoder.layers.0.mlp.router.weight"], torch.ones(3, 5)), "nothing was written"


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor its index"):
        load(tmp_path / "in")
    index = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors does not exist"):
        load(tmp_path / "in")
