"""Hugging Face directories and checkpoints of the torch backend (DCP), both ways.

A checkpoint of the torch backend has transformers' parameters, ``model.NAME`` each; which regions of them
are which tensors of a Hugging Face directory, transformers' model says, built without memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megarl.config.model import ModelConfig
from megarl.convert import hf_side
from megarl.convert.adapters import lora_settings
from megarl.convert.commands import config_places, find_iteration, output_directory
from megarl.convert.distcp import DistcpReader
from megarl.convert.hf_side import HfReader
from megarl.errors import UserError
from megarl.models import load_architecture
from megarl.models.table import Region
from megarl.models.transformers_regions import transformers_regions
from megarl.trainer.checkpoint_files import RankFiles
from megarl.trainer.torch.checkpoint import MODEL, TRAINER_FILE, Held, read_tensors, write_facts
from megarl.trainer.torch.lora import is_adapter
from megarl.trainer.torch.model import build_decoder, named_tensors
from megarl.trainer.torch.shards import Part, chunks_of
from megarl.weights.hf import region_index, safetensors_files
from megarl.weights.peft import merged

HF_FILES = "hf"
"""Folder of a converted checkpoint with config.json and the tokenizer, for the way back."""


def is_torch_checkpoint(directory: Path) -> bool:
    """Whether a DCP directory is the torch backend's."""
    return (directory / TRAINER_FILE).is_file()


def hf_to_torch(
    source: Path, target: Path, *, dtype: str | None, max_bytes: int, overwrite: bool = False
) -> None:
    """Write a checkpoint of the torch backend, without optimizer state, of a Hugging Face directory.

    Raises:
        UserError: transformers cannot build the model, or tensors are missing, left over or misshapen.
    """
    reader = HfReader(source, load_architecture(source, any_family=True))
    wanted = getattr(torch, dtype) if dtype else None
    shapes, regions = _model(source, set(safetensors_files(source)))
    made_of: dict[str, list[Region]] = {}
    for region in regions:
        made_of.setdefault(region.param, []).append(region)
    request = {"source": str(source.resolve()), "dtype": str(wanted), "max_bytes": max_bytes, "to": "torch"}
    with output_directory(target, request, overwrite) as partial:
        sizes = {name: math.prod(shape) * 4 for name, shape in shapes.items()}
        groups = list(hf_side.plan_shards(sizes, max_bytes).values())
        files = [
            RankFiles(partial, number, {}, lambda folder: write_facts(folder, 0))
            for number in range(len(groups))
        ]
        reports = []
        for file, names in zip(files, groups, strict=True):
            for name in names:
                parts = made_of[name]
                stored = wanted or reader.dtype_of(parts[0].hf)
                whole = torch.empty(shapes[name], dtype=stored)
                for region in parts:
                    piece = reader.read(region.hf)[tuple(slice(*span) for span in region.box)]
                    whole[region_index(region.index)] = piece.to(stored)
                file.add_piece(MODEL + name, [0] * whole.ndim, whole, stored, whole.shape)
            reports.append(file.write())
        files[0].complete(reports)
        hf_side.carry_over(source, partial / HF_FILES)


def torch_to_hf(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None,
    dtype: str | None,
    max_bytes: int,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face directory of a checkpoint of the torch backend; see :func:`hf_to_torch`."""
    directory = find_iteration(source)
    hf_files = hf_config or next((place for place in config_places(source, directory) if place), None)
    if hf_files is None:
        raise UserError(f"{source}: no config.json beside it; name a directory that has one (--hf-config)")
    stored = DistcpReader(directory)
    if not is_torch_checkpoint(directory):
        raise UserError(f"{source} is no checkpoint of the torch backend (megatron-to-hf reads Megatron's)")
    wanted = getattr(torch, dtype) if dtype else None
    tensors: _Tensors | _MergedTensors
    if any(is_adapter(key) for key in stored.shapes):
        tensors = _MergedTensors(directory, hf_files, stored, wanted)
    else:
        shapes, regions = _model(hf_files, _names(hf_files))
        tensors = _Tensors(directory, shapes, regions, stored, wanted)
    shards = hf_side.plan_shards(tensors.sizes, max_bytes)
    request = {"source": str(source.resolve()), "dtype": str(wanted), "max_bytes": max_bytes}
    with output_directory(target, request, overwrite) as partial:
        for _ in hf_side.write_shards(partial, shards, tensors.read):
            pass
        hf_side.write_index(partial, shards, tensors.sizes)
        first = next(iter(stored.dtypes[key] for key in stored.shapes if key.startswith(MODEL)))
        hf_side.carry_over(hf_files, partial, wanted or first)


class _Tensors:
    """A checkpoint's tensors by their Hugging Face names, one parameter in memory at a time."""

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        regions: list[Region],
        stored: DistcpReader,
        dtype: torch.dtype | None,
    ) -> None:
        self._directory, self._shapes, self._stored, self._dtype = directory, shapes, stored, dtype
        self._made_of: dict[str, list[Region]] = {}
        for region in regions:
            self._made_of.setdefault(region.hf, []).append(region)
        self._last: tuple[str, torch.Tensor] | None = None
        self.sizes = {name: self._bytes(parts) for name, parts in self._made_of.items()}

    def _type(self, param: str) -> torch.dtype:
        if MODEL + param not in self._stored.dtypes:
            raise UserError(f"{self._directory}: missing tensor {MODEL + param}")
        return self._dtype or self._stored.dtypes[MODEL + param]

    def _bytes(self, parts: list[Region]) -> int:
        counts = (math.prod(stop - start for start, stop in part.box) for part in parts)
        return sum(counts) * self._type(parts[0].param).itemsize

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        parts = self._made_of[name]
        if len(parts) == 1:
            return self._piece(parts[0]).contiguous()
        whole = torch.empty(
            [max(part.box[dim][1] for part in parts) for dim in range(len(parts[0].box))],
            dtype=self._type(parts[0].param),
        )
        for part in parts:
            whole[tuple(slice(*span) for span in part.box)] = self._piece(part)
        return whole

    def _piece(self, region: Region) -> torch.Tensor:
        if self._last is None or self._last[0] != region.param:
            found, wanted = self._stored.shapes[MODEL + region.param], self._shapes[region.param]
            if found != wanted:
                sizes = f"shape {list(found)}, the model {list(wanted)}"
                raise UserError(f"{self._directory}: {MODEL + region.param} has {sizes}")
            self._last = (region.param, read_whole(self._directory, self._stored, MODEL + region.param))
        return self._last[1][region_index(region.index)].to(self._type(region.param))


class _MergedTensors:
    """The model of a LoRA run, whose checkpoint holds adapters alone: they are merged as a tensor is read."""

    def __init__(self, directory: Path, base: Path, stored: DistcpReader, dtype: torch.dtype | None) -> None:
        """``base`` is the Hugging Face directory the run started from, or a copy of it."""
        lora = lora_settings(directory)
        architecture = load_architecture(base, any_family=True)
        self._directory, self._stored, self._scale = directory, stored, lora.alpha / lora.rank
        self._base = HfReader(base, architecture)
        self._trained_as = next(kind for key, kind in stored.dtypes.items() if is_adapter(key))
        self._dtype = dtype or self._trained_as
        shapes = architecture.hf_shapes()
        self.sizes = {name: math.prod(shape) * self._dtype.itemsize for name, shape in shapes.items()}
        ours = (key.removeprefix(MODEL) for key in stored.shapes if key.startswith(MODEL) and is_adapter(key))
        adapted = {name.partition(".lora_")[0] for name in ours}
        if strange := sorted(module for module in adapted if f"{module}.weight" not in shapes):
            raise UserError(f"{directory}: {base} has no tensor {strange[0]}.weight, which an adapter is of")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor with its adapter."""
        weight, module = self._base.read(name).to(self._trained_as), name.removesuffix(".weight")
        keys = [f"{MODEL}{module}.lora_{which}.default.weight" for which in ("A", "B")]
        if keys[0] in self._stored.shapes:
            a, b = (read_whole(self._directory, self._stored, key) for key in keys)
            weight = merged(weight, a, b, self._scale)
        return weight.to(self._dtype)


def read_whole(directory: Path, stored: DistcpReader, key: str) -> torch.Tensor:
    """Return one whole tensor of a checkpoint, by its key."""
    shape = stored.shapes[key]
    whole = torch.empty(shape, dtype=stored.dtypes[key])
    read_tensors(directory, {key: Held(whole, Part(shape, chunks_of(shape, None)))})
    return whole


def _names(directory: Path) -> set[str] | None:
    """Of the tensors in a Hugging Face directory, if it has any."""
    return set(safetensors_files(directory)) if any(directory.glob("*.safetensors")) else None


def _model(directory: Path, names: set[str] | None) -> tuple[dict[str, tuple[int, ...]], list[Region]]:
    """Shapes of the parameters that transformers' model has, and the regions of tensors they are made of."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    decoder = build_decoder(ModelConfig(path=str(directory)), torch.float32)
    assert decoder.family == config["model_type"]
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(decoder)}
    return shapes, transformers_regions(decoder.lm, shapes, names)
