"""`megarl merge`: a LoRA adapter in PEFT's format and its base model, as one Hugging Face model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarl.config.hub import is_id
from megarl.convert import hf_side
from megarl.convert.commands import output_directory, progress_bar
from megarl.convert.sources import ADAPTER_CONFIG, adapter_directory, model_directory
from megarl.errors import UserError
from megarl.files import read_json_object
from megarl.models import load_architecture
from megarl.models.lora import Matrix, peft_name
from megarl.weights.hf import open_weights
from megarl.weights.peft import merged

_CONFIG, _WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
# Options of PEFT that change what is computed, and their value without effect.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "modules_to_save": None,
}


def merge(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_bytes: int = 2 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write ``target``: the base model with W + scale B A in place of every adapted W.

    Sums are computed in float32 and rounded once to the stored dtype, or to ``dtype``. Memory holds one file
    of at most ``max_bytes`` at a time. An interrupted merge resumes; ``target`` appears when it is complete.

    Args:
        source: an adapter's directory or hub id, or a run directory with one (<run.dir>/adapter).
        target: the new directory.
        base: the base model's directory or hub id; None: the one that the adapter names.
        dtype: of all tensors; None: as stored in the base.
        max_bytes: limit of a file.
        overwrite: replace ``target``.

    Raises:
        UserError: no adapter, no base, tensors that do not fit it, or a kind of adapter that is not LoRA.
    """
    adapter = Adapter.open(source)
    if base is not None:
        directory = model_directory(str(base), "--base")
    else:
        try:
            directory = model_directory(
                adapter.base, f"{adapter.directory / _CONFIG}: base_model_name_or_path"
            )
        except UserError as error:
            raise UserError(f"{error}; --base DIR names it") from error
    architecture = load_architecture(directory, any_family=True)
    reader = hf_side.HfReader(directory, architecture)
    shapes = architecture.hf_shapes()
    adapter.check(shapes)
    wanted = getattr(torch, dtype) if dtype else None

    def read(name: str) -> torch.Tensor:
        weight, kept = reader.read(name), wanted or reader.dtype_of(name)
        return adapter.merge(name, weight.to(torch.promote_types(weight.dtype, kept))).to(kept)

    sizes = {
        name: math.prod(shape) * (wanted or reader.dtype_of(name)).itemsize for name, shape in shapes.items()
    }
    shards = hf_side.plan_shards(sizes, max_bytes)
    request = {
        "source": str(adapter.directory.resolve()),
        "base": str(directory.resolve()),
        "dtype": str(wanted),
        "max_bytes": max_bytes,
    }
    with output_directory(target, request, overwrite) as partial:
        with progress_bar() as progress:
            task = progress.add_task("writing safetensors files", total=len(shards))
            for _ in hf_side.write_shards(partial, shards, read):
                progress.advance(task)
        hf_side.write_index(partial, shards, sizes)
        hf_side.carry_over(directory, partial, wanted)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A directory of PEFT's: its settings, and its tensors by name."""

    directory: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Any]  # name -> safetensors slice

    @classmethod
    def open(cls, source: str | Path) -> Adapter:
        """Open an adapter's directory, or that of a run.

        Raises:
            UserError: there is none, or not a plain LoRA adapter.
        """
        directory = adapter_directory(str(source), "adapter")
        settings = read_json_object(directory / _CONFIG, "adapter")
        for name, plain in _PLAIN.items():
            if settings.get(name, plain) not in (plain, None):
                raise UserError(
                    f"{directory / _CONFIG}: {name}: only {plain!r} can be merged (got {settings[name]!r})"
                )
        if not (directory / _WEIGHTS).is_file():
            raise UserError(f"{directory}: no {_WEIGHTS}")
        handle = open_weights(directory / _WEIGHTS)
        return cls(directory, settings, {name: handle.get_slice(name) for name in handle.keys()})  # noqa: SIM118

    @property
    def base(self) -> str:
        """The base model that the adapter names; a hub id with the revision that it was trained on."""
        named = str(self.settings.get("base_model_name_or_path") or "")
        revision = self.settings.get("revision")
        return f"{named}@{revision}" if revision and is_id(named) and "@" not in named else named

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError for every tensor that fits no weight of these shapes."""
        known = {}
        for name, shape in shapes.items():
            if name.endswith(".weight") and len(shape) == 2:
                module = name.removesuffix(".weight")
                rank = self.rank(module)
                known[peft_name(module, "A")] = (rank, shape[1])
                known[peft_name(module, "B")] = (shape[0], rank)
        wrong = []
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.get_shape())
            if name not in known:
                wrong.append(f"{name}: the base model has no such weight")
            elif shape != known[name]:
                wrong.append(f"{name}: expected shape {known[name]}, has {shape}")
            elif (other := _other(name)) not in self.tensors:
                wrong.append(f"{name}: {other} is missing")
        if wrong:
            raise UserError("\n".join(f"{self.directory / _WEIGHTS}: {line}" for line in wrong))
        if not self.tensors:
            raise UserError(f"{self.directory / _WEIGHTS}: no tensors in it")

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of the base with its adapter, unchanged if it has none."""
        module = name.removesuffix(".weight")
        matrices: tuple[Matrix, Matrix] = ("A", "B")
        names = [peft_name(module, which) for which in matrices]
        if name == module or names[0] not in self.tensors:
            return weight
        a, b = (self.tensors[each][:] for each in names)
        return merged(weight, a, b, self.scale(module))

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return int(self._of(module, "rank_pattern", "r"))

    def scale(self, module: str) -> float:
        """Return alpha / r, with rank-stabilised LoRA alpha / sqrt(r) (arXiv:2312.03732)."""
        rank, alpha = self.rank(module), float(self._of(module, "alpha_pattern", "lora_alpha"))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of(self, module: str, pattern: str, name: str) -> Any:
        """Return a module's own value of a setting; PEFT matches its patterns with the end of the name."""
        for key, value in (self.settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        if name not in self.settings:
            raise UserError(f"{self.directory / _CONFIG}: {name} is missing")
        return self.settings[name]


def _other(name: str) -> str:
    return name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
