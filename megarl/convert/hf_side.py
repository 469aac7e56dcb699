"""Hugging Face directories for the converter: read single tensors, write files one by one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megarl.errors import UserError
from megarl.models.table import Architecture
from megarl.weights.hf import CARRIED_OVER, WeightFiles, open_weights

_MAX_MAPPED_BYTES = 64 * 2**20
"""Limit of mapped files: the pages of an open mapping count as memory of the process."""


class HfReader(WeightFiles):
    """The tensors of a Hugging Face directory, checked against the architecture on construction."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        super().__init__(directory, architecture)
        if self.problems:
            raise UserError("\n".join(self.problems))
        self._mapped = 0
        self.dtype = self.dtype_of(next(iter(architecture.hf_shapes())))

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the stored dtype."""
        return _dtype(self.slice(name))

    def num_bytes(self, name: str, dtype: torch.dtype | None) -> int:
        """Return the size of a tensor in bytes, as ``dtype`` (None: the stored dtype)."""
        shape = self.slice(name).get_shape()
        return math.prod(shape) * (dtype or self.dtype_of(name)).itemsize

    def read(self, name: str) -> torch.Tensor:
        """Return one full tensor."""
        tensor: torch.Tensor = self.slice(name)[:]
        self._mapped += tensor.nbytes
        if self._mapped > _MAX_MAPPED_BYTES:
            self.unmap()
            self._mapped = 0
        return tensor


class IgnoredTensors:
    """Tensors stored next to the checkpoint by an earlier conversion."""

    def __init__(self, hf_files: Path, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._slices: dict[str, Any] = {}
        for path in sorted(hf_files.glob(f"{_IGNORED}*.safetensors")):
            handle = open_weights(path)
            self._slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        self.sizes = {
            name: math.prod(slice_.get_shape()) * (dtype or _dtype(slice_)).itemsize
            for name, slice_ in self._slices.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one full tensor."""
        tensor: torch.Tensor = self._slices[name][:]
        return tensor.to(self._dtype or tensor.dtype)


_IGNORED = "multi-token-prediction"


def keep_or_name_ignored(
    reader: HfReader, directory: Path, dtype: torch.dtype | None, max_bytes: int, *, keep: bool
) -> None:
    """Copy tensors that no rule uses to ``directory``, or print that they are dropped."""
    if not reader.ignored:
        return
    if not keep:
        print(
            f"dropped: {len(reader.ignored)} tensors of multi-token prediction, which the model does not use "
            f"(first: {reader.ignored[0]}; --mtp keep stores them)"
        )
        return
    shards = plan_shards({name: reader.num_bytes(name, dtype) for name in reader.ignored}, max_bytes)
    renamed = {file.replace("model", _IGNORED, 1): names for file, names in shards.items()}
    for _ in write_shards(
        directory, renamed, lambda name: reader.read(name).to(dtype or reader.dtype_of(name))
    ):
        pass


def _dtype(slice_: Any) -> torch.dtype:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    name = slice_.get_dtype()
    if name not in names:
        raise UserError(f"tensors of type {name} are not supported ({', '.join(names)})")
    dtype: torch.dtype = getattr(torch, names[name])
    return dtype


def plan_shards(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Return file name -> tensor names, in order; at most ``max_bytes`` per file (or one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n + 1:05}-of-{len(groups):05}.safetensors": g for n, g in enumerate(groups)}


def write_shards(
    directory: Path,
    shards: dict[str, list[str]],
    read: Callable[[str], torch.Tensor],
) -> Iterator[tuple[str, bool]]:
    """Write missing files; yield (file, whether it existed already) for each."""
    for file, names in shards.items():
        path = directory / file
        done = path.is_file()  # renamed into place when complete
        if not done:
            partial = path.with_suffix(".partial")
            save_file({name: read(name) for name in names}, partial, metadata={"format": "pt"})
            partial.rename(path)
        yield file, done


def write_index(directory: Path, shards: dict[str, list[str]], sizes: dict[str, int]) -> None:
    """Write model.safetensors.index.json if there is more than one file."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def carry_over(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy configuration and tokenizer files; with ``dtype``, set it in config.json."""
    target.mkdir(parents=True, exist_ok=True)
    for name in CARRIED_OVER:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    config = json.loads((target / "config.json").read_text())
    quantized = config.pop("quantization_config", None)  # what is written is not
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if quantized is not None or dtype is not None:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
