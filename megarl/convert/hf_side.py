"""Hugging Face directories for the converter: tensors one at a time, files written one by one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megarl.errors import UserError
from megarl.models.table import Architecture, name_problems
from megarl.weights.hf import CARRIED_OVER, safetensors_files


class HfReader:
    """The tensors of a Hugging Face directory, checked against the architecture at once."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self._files = safetensors_files(directory)
        self._handles: dict[Path, Any] = {}
        shapes = architecture.hf_shapes()
        names = {name for name in self._files if not architecture.ignores(name)}
        if architecture.spec.tied_embeddings:
            names -= {"lm_head.weight"}  # may repeat the embedding
        wrong = name_problems(shapes, names, str(directory))
        for name, shape in shapes.items():
            if name in self._files and (found := tuple(self._slice(name).get_shape())) != shape:
                wrong.append(f"{directory}: tensor {name} has shape {list(found)}, expected {list(shape)}")
        if wrong:
            raise UserError("\n".join(wrong))
        self.dtype = self.read(next(iter(shapes))).dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        tensor: torch.Tensor = self._slice(name)[:]
        return tensor

    def _slice(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt").__enter__()
        return self._handles[path].get_slice(name)


def plan_shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in order; at most ``max_bytes`` per file (or one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * item_bytes
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
    """Write the missing files; yields (file, whether an earlier run had written it) as they are done."""
    for file, names in shards.items():
        path = directory / file
        done = path.is_file()  # renamed into place when complete
        if not done:
            partial = path.with_suffix(".partial")
            save_file({name: read(name) for name in names}, partial, metadata={"format": "pt"})
            partial.rename(path)
        yield file, done


def write_index(
    directory: Path, shards: dict[str, list[str]], shapes: dict[str, tuple[int, ...]], item_bytes: int
) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    if len(shards) == 1:
        return
    total = sum(math.prod(shape) for shape in shapes.values()) * item_bytes
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def carry_over(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy configuration and tokenizer files; config.json then names ``dtype``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in CARRIED_OVER:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    if dtype is not None:
        config = json.loads((target / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
