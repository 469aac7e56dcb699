"""Weights in FP8 with block scales, dequantised as they are read: equal to float64, element by element."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.convert import commands
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.weights.file_owner import FileOwner
from megarl.weights.fp8 import BlockScaled
from megarl.weights.hf import WeightFiles
from tests.models.tiny import save_model
from tests.trainer import ranks
from tests.trainer.world import world

BLOCK = (24, 40)  # divides none of the shapes
QUANTIZED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
Tensors = dict[str, torch.Tensor]


def quantize(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in FP8 and their scales, block by block."""
    (m, n), (rows, columns) = weight.shape, block
    numbers = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(m / rows), math.ceil(n / columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[at].abs().max() / 448
            numbers[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return numbers, scales


def by_hand(numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """In float64, element by element."""
    values, factors = numbers.double().numpy(), scales.double().numpy()
    return np.array(
        [
            [value * factors[i // block[0], j // block[1]] for j, value in enumerate(row)]
            for i, row in enumerate(values)
        ]
    )


def save_fp8(name: str, directory: Path, **quantization: Any) -> dict[str, np.ndarray]:
    """A model whose projections are in FP8; returns what its tensors are worth."""
    save_model(name, directory)
    path, stored, worth = directory / "model.safetensors", Tensors(), dict[str, np.ndarray]()
    for key, weight in load_file(path).items():
        if "proj.weight" in key:
            stored[key], stored[f"{key}_scale_inv"] = quantize(weight)
            worth[key] = by_hand(stored[key], stored[f"{key}_scale_inv"])
        else:
            stored[key], worth[key] = weight, weight.double().numpy()
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = QUANTIZED | quantization
    (directory / "config.json").write_text(json.dumps(config))
    return worth


@pytest.mark.parametrize(
    "part",
    [
        np.s_[:, :],
        np.s_[0:24, 0:40],
        np.s_[23:25, 39:41],
        np.s_[5:90, 13:97],
        np.s_[99:100, 0:100],
        np.s_[50:50, 3:4],
    ],
)
def test_parts_of_a_tensor(part: tuple[slice, slice], tmp_path: Path) -> None:
    torch.manual_seed(0)
    numbers, scales = quantize(torch.randn(100, 100))
    expected = by_hand(numbers, scales)[part]
    found = BlockScaled(numbers_of(numbers), numbers_of(scales), BLOCK)[part]
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy() - expected).max(initial=0.0) <= 2**-24 * 5
    assert found.shape == expected.shape


def numbers_of(tensor: torch.Tensor) -> Any:
    """A slice as safetensors has it."""

    class Slice:
        def get_shape(self) -> list[int]:
            return list(tensor.shape)

        def __getitem__(self, index: Any) -> torch.Tensor:
            return tensor[index]

    return Slice()


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-tied", "qwen3-moe-mixed-tied"])
def test_a_trainer_has_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    """On one rank, and cut over two tensor ranks, whose parts begin within blocks."""
    worth = save_fp8(name, tmp_path)
    assert any("proj" in key for key in worth)
    for size, parallel in ((1, {}), (2, {"tensor_parallel_size": 2, "sequence_parallel": True})):
        [(_, found), *_] = world(size).run(
            ranks.types_and_weights, str(tmp_path), "float32", parallel=parallel
        )
        assert found.keys() == worth.keys()
        for key, value in worth.items():
            assert np.abs(found[key] - value).max() <= 2**-23 * np.abs(value).max(), key


def test_an_export_is_no_longer_quantised(tmp_path: Path) -> None:
    save_fp8("qwen3-tied", tmp_path / "fp8")
    world(1).run(ranks.train_export_and_offer, str(tmp_path / "fp8"), str(tmp_path / "hf"), False)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not [key for key in load_file(tmp_path / "hf" / "model.safetensors") if key.endswith("_scale_inv")]


def test_tensors_without_a_table(tmp_path: Path) -> None:
    worth = save_fp8("qwen3-tied", tmp_path)
    found = FileOwner(tmp_path, "float32")._tensors
    assert found.keys() == worth.keys()
    for key, value in worth.items():
        assert np.abs(found[key].double().numpy() - value).max() <= 2**-23 * np.abs(value).max(), key


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_conversion_dequantises(dtype: str | None, tmp_path: Path) -> None:
    """To bfloat16, of which the numbers were made, unless another type is asked for."""
    worth = save_fp8("deepseek-v3", tmp_path / "fp8")
    commands.hf_to_megatron(tmp_path / "fp8", tmp_path / "megatron", dtype=dtype, max_bytes=2**30)
    commands.megatron_to_hf(
        tmp_path / "megatron", tmp_path / "back", hf_config=None, dtype=None, max_bytes=2**30
    )
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == worth.keys()
    for key, value in worth.items():
        in_fp8 = "proj.weight" in key
        assert found[key].dtype == (torch.bfloat16 if in_fp8 and dtype is None else torch.float32), key
        step = 2**-8 if found[key].dtype == torch.bfloat16 else 2**-23
        assert (np.abs(found[key].double().numpy() - value) <= step * np.abs(value)).all(), key
    for path in (tmp_path / "megatron" / "release" / "hf", tmp_path / "megatron" / "hf", tmp_path / "back"):
        if path.exists():
            assert "quantization_config" not in json.loads((path / "config.json").read_text())


KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{KEY}_scale_inv"), f"tensor {KEY} is stored as F8_E4M3, and has no scales"),
        (lambda t: t.update({KEY: t[KEY].float()}), f"tensor {KEY} has scales, but is stored as F32"),
        (
            lambda t: t.update({f"{KEY}_scale_inv": torch.ones(2, 2)}),
            f"tensor {KEY}: its scales have shape [2, 2], expected [3, 3] for blocks of 24 x 40",
        ),
        (
            lambda t: t.update({f"{KEY}_scale_inv": t[f"{KEY}_scale_inv"].double()}),
            f"tensor {KEY}: its scales have type F64 (known: F32, BF16, F16)",
        ),
        (
            lambda t: t.update({KEY: t[KEY].float().to(torch.float8_e5m2)}),
            f"tensor {KEY} is stored as F8_E5M2, and only F8_E4M3 is supported",
        ),
    ],
)
def test_what_does_not_fit_is_a_line(change: Any, words: str, tmp_path: Path) -> None:
    save_fp8("qwen3-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert WeightFiles(tmp_path, load_architecture(tmp_path)).problems == [f"{tmp_path}: {words}"]


def test_scales_of_nothing_and_numbers_without_a_configuration(tmp_path: Path) -> None:
    save_fp8("qwen3-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["x_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = WeightFiles(tmp_path, load_architecture(tmp_path))
    assert files.problems == [f"{tmp_path}: tensor x_scale_inv scales x, which is not there"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    [first, *_] = [
        line for line in WeightFiles(tmp_path, load_architecture(tmp_path)).problems if "stored" in line
    ]
    assert "F8_E4M3, and config.json has no quantization_config with a weight_block_size" in first


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        "fp8",
    ],
)
@pytest.mark.parametrize("any_family", [False, True])
def test_other_quantisations_are_refused_in_one_line(
    quantization: Any, any_family: bool, tmp_path: Path
) -> None:
    save_model("qwen3-tied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": quantization, "model_type": "own" if any_family else "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config\.json: quantization_config \(\w+\) is not supported"
    ) as caught:
        load_architecture(tmp_path, any_family=any_family)
    assert "\n" not in str(caught.value)
