"""Checkpoints of LoRA runs: they hold the adapters only; the base weights are those of model.path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from megarl.config.lora import LoraConfig
from megarl.convert.distcp import DistcpReader
from megarl.convert.hf_side import HfReader
from megarl.convert.pieces import Piece
from megarl.errors import UserError
from megarl.models.lora import Matrix, adapted_modules, module_of, peft_name, targets_of
from megarl.models.table import Architecture
from megarl.weights.peft import merged

_MARK = "_lora."


def has_adapters(names: Iterable[str]) -> bool:
    """Return whether any of these tensor names is an adapter's."""
    return any(_MARK in name for name in names)


class AdapterCheckpoint:
    """The model of a LoRA run; adapters are merged as each tensor is read."""

    def __init__(self, reader: DistcpReader, directory: Path, architecture: Architecture, base: Path) -> None:
        """``base`` is the Hugging Face directory the run started from, or a copy of it.

        Raises UserError if the run's configuration is missing or does not match.
        """
        self.reader, self.architecture, self.hf_files = reader, architecture, base
        lora = lora_settings(directory)
        self._scale, self._base = lora.alpha / lora.rank, HfReader(base, architecture)
        self._pieces = _pieces(architecture, lora)
        self.dtype = reader.dtypes[next(name for name in reader.shapes if _MARK in name)]
        wrong = [
            f"{directory}: tensor {piece.key} has shape {reader.shapes.get(piece.key)}, expected "
            f"{piece.global_shape}"
            for piece in self._pieces.values()
            if reader.shapes.get(piece.key) != piece.global_shape
        ]
        if wrong:
            raise UserError("\n".join(dict.fromkeys(wrong)))

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a Hugging Face tensor in the run; the same for all."""
        return self.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return one full Hugging Face tensor with its adapter merged."""
        weight, module = self._base.read(name).to(self.dtype), name.removesuffix(".weight")
        if peft_name(module, "A") not in self._pieces:
            return weight
        a, b = (self.reader.read(self._pieces[peft_name(module, which)]) for which in ("A", "B"))
        return merged(weight, a, b, self._scale)


def lora_settings(directory: Path) -> LoraConfig:
    """Read the adapters' settings from the configuration of the run that wrote a checkpoint."""
    config = directory.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{directory}: it holds LoRA adapters, whose scale is in the run's config.yaml, but {config} "
            "does not exist"
        )
    lora = yaml.safe_load(config.read_text()).get("lora")
    if lora is None:
        raise UserError(f"{config}: lora: not set, but {directory} holds LoRA adapters")
    return LoraConfig.model_validate(lora)


def _pieces(architecture: Architecture, lora: LoraConfig) -> dict[str, Piece]:
    """Return the piece of every A and B in the checkpoint, by PEFT's name."""
    spec, targets = architecture.spec, targets_of(architecture, lora)
    stacked = not (spec.moe and spec.dense_layers)  # different layers are stored one by one
    modules = adapted_modules(architecture, lora)
    found = {}
    for rule in architecture.rules:
        if module_of(rule.hf, targets) is None:
            continue
        layer_name = rule.trainer[0].param.removesuffix(".weight")
        for layer in range(spec.num_layers):
            module = module_of(rule.hf.format(layer=layer), targets)
            if module is None or module not in modules:
                continue
            outputs, inputs = modules[module]
            shapes: dict[Matrix, tuple[int, int]] = {"A": (lora.rank, inputs), "B": (outputs, lora.rank)}
            for which, shape in shapes.items():
                key = f"{layer_name}{_MARK}{module.rpartition('.')[2]}_{which}"
                key = key.replace(".{layer}.", ".") if stacked else key.format(layer=layer)
                axes = ((layer, spec.num_layers),) if stacked else ()
                name = peft_name(module, which)
                found[name] = Piece(key, axes, ((name, shape),))
    return found
