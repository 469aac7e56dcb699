"""`megarl convert inspect` and `--verify`: list a checkpoint, and compare the logits of two."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megarl.convert.adapters import has_adapters
from megarl.convert.commands import Checkpoint, config_places, dialect_of, find_iteration
from megarl.convert.distcp import DistcpReader
from megarl.errors import UserError
from megarl.files import read_json_object
from megarl.models import load_architecture
from megarl.terminal import printable
from megarl.weights.hf import open_weights, safetensors_files

_NUM_TOKENS = 64
_TOLERANCE = 1e-4  # fp32 on both sides, relative to the largest logit


def require_model(source: Path, hf_config: Path | None) -> None:
    """Raise UserError before anything is written if ``--verify`` cannot build the model."""
    is_hf = (source / "config.json").is_file()
    spec = (load_architecture(source) if is_hf else Checkpoint.open(source, hf_config).architecture).spec
    if spec.not_trainable is not None:
        raise UserError(
            f"--verify: {spec.family} can be converted, but not its logits computed: {spec.not_trainable}"
        )


def verify(checkpoint_dir: Path, hf_dir: Path, base: Path | None = None) -> float:
    """Return the largest fp32 logit difference on random tokens, Megatron's model against Hugging Face's.

    Weights are rounded to the Megatron checkpoint's dtype on both sides. A LoRA checkpoint is merged with
    ``base`` (None: the model of its run). Raises UserError above the tolerance.
    """
    from transformers import AutoModelForCausalLM

    holds_adapters = has_adapters(DistcpReader(find_iteration(checkpoint_dir)).shapes)
    checkpoint = Checkpoint.open(checkpoint_dir, base if holds_adapters else hf_dir)
    draw = random.Random(0)
    token_ids = [draw.randrange(checkpoint.architecture.spec.vocab_size) for _ in range(_NUM_TOKENS)]
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(checkpoint.dtype))
        expected = model(torch.tensor([token_ids])).logits[0]
    del model
    from megarl.trainer.megatron.logits import logits

    found = logits(checkpoint.architecture, checkpoint.read, token_ids)
    difference = float((found - expected).abs().max())
    limit = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise UserError(
            f"{checkpoint_dir}: logits differ from those of {hf_dir} by up to {difference:.2e} "
            f"on {_NUM_TOKENS} random tokens ({limit:.0e} allowed)"
        )
    return difference


def inspect(path: Path, *, as_json: bool) -> str:
    """Describe a Hugging Face, Megatron-LM or MegaRL checkpoint: format, family, size and tensors."""
    facts = _describe(path)
    if as_json:
        return json.dumps(facts, indent=2)  # which escapes them itself
    table = Table("tensor", "shape", "type", "MiB", title=str(path), title_justify="left")
    for tensor in facts["tensors"]:
        mib = f"{tensor['bytes'] / 2**20:.2f}"
        table.add_row(tensor["name"], "x".join(map(str, tensor["shape"])), tensor["dtype"], mib)
    console = Console(width=120)
    with console.capture() as capture:
        for key in ("format", "family", "iteration", "optimizer_state", "num_parameters", "bytes"):
            value = facts[key]
            console.print(f"{key}: {value:,}" if isinstance(value, int) and value > 9 else f"{key}: {value}")
        console.print(table)
    return printable(capture.get())


def _describe(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        tensors = _hf_tensors(path)
        facts: dict[str, Any] = {"format": "Hugging Face", "iteration": None}
        family: str | None = read_json_object(path / "config.json").get("model_type")
        optimizer = False
    else:
        directory = find_iteration(path)
        reader = DistcpReader(directory)
        tensors = [
            _entry(name, shape, str(reader.dtypes[name]).removeprefix("torch."))
            for name, shape in reader.shapes.items()
        ]
        names = {"megatron": "Megatron-LM (torch_dist)", "megarl": "MegaRL (torch_dist)"}
        kind, iteration = "MegaRL, trainer.backend torch (DCP)", None
        if not (directory / "trainer.json").is_file():
            kind, iteration = names[dialect_of(reader)], _iteration(directory)
        facts = {"format": kind, "iteration": iteration}
        place = next((p for p in config_places(path, directory) if p), None)
        family = read_json_object(place / "config.json").get("model_type") if place else None
        optimizer = any(name.startswith(("optimizer.", "chained_")) for name in reader.shapes)
    model = [t for t in tensors if not t["name"].startswith(("optimizer.", "chained_"))]
    return facts | {
        "family": family,
        "optimizer_state": optimizer,
        "num_parameters": sum(math.prod(t["shape"]) for t in model),
        "bytes": sum(t["bytes"] for t in tensors),
        "tensors": tensors,
    }


def _hf_tensors(path: Path) -> list[dict[str, Any]]:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    entries = []
    for name, file in safetensors_files(path).items():
        with open_weights(file) as handle:
            part = handle.get_slice(name)
            entries.append(
                _entry(name, tuple(part.get_shape()), names.get(part.get_dtype(), part.get_dtype()))
            )
    return entries


def _entry(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    item = getattr(torch, dtype).itemsize if hasattr(torch, dtype) else 1
    return {"name": name, "shape": list(shape), "dtype": dtype, "bytes": math.prod(shape) * item}


def _iteration(directory: Path) -> int | str:
    digits = directory.name.rsplit("_", 1)[-1]
    return int(digits) if digits.isdigit() else directory.name
