"""A Hugging Face directory as an owner of weights, where no trainer is: for evaluation of any model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from megarl.models.table import Region
from megarl.weights.hf import safetensors_files
from megarl.weights.plan import Owner
from megarl.weights.shared_storage import pool_parameters, share_parameters


class FileOwner:
    """The tensors of ``model_dir``, converted to ``dtype``, in host memory that engines can map.

    Keep it until the engine has taken the weights.
    """

    def __init__(self, model_dir: str | Path, dtype: str) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for name, path in safetensors_files(Path(model_dir)).items():
            with safe_open(path, framework="pt") as file:
                self._tensors[name] = file.get_tensor(name).to(getattr(torch, dtype))
        pool_parameters(self._tensors)

    def owner(self) -> Owner:
        """Return what there is: each tensor under its own name."""
        boxes = {name: tuple((0, size) for size in each.shape) for name, each in self._tensors.items()}
        regions = [Region(name, box, name, box) for name, box in boxes.items()]
        return share_parameters(self._tensors, regions)
