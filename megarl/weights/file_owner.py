"""A Hugging Face directory as an owner of weights, where no trainer is: for evaluation of any model."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.files import read_json_object
from megarl.models.quantization import SCALE, fp8_block
from megarl.models.table import Region
from megarl.weights.fp8 import BlockScaled
from megarl.weights.hf import open_weights, safetensors_files
from megarl.weights.plan import Owner
from megarl.weights.shared_storage import pool_parameters, share_parameters


class FileOwner:
    """The tensors of ``model_dir``, converted to ``dtype``, in host memory that engines can map.

    Keep it until the engine has taken the weights.
    """

    def __init__(self, model_dir: str | Path, dtype: str) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        files = safetensors_files(Path(model_dir))
        block = fp8_block(read_json_object(Path(model_dir) / "config.json"))
        for name, path in files.items():
            if block is not None and name.endswith(SCALE):
                continue
            with open_weights(path) as file:
                stored = file.get_slice(name)
                if block is not None and (scale := f"{name}{SCALE}") in files:
                    with open_weights(files[scale]) as scales:
                        tensor = BlockScaled(stored, scales.get_slice(scale), block)[:]
                else:
                    tensor = file.get_tensor(name)
            self._tensors[name] = tensor.to(getattr(torch, dtype))
        pool_parameters(self._tensors)

    def owner(self) -> Owner:
        """Return what there is: each tensor under its own name."""
        boxes = {name: tuple((0, size) for size in each.shape) for name, each in self._tensors.items()}
        regions = [Region(name, box, name, box) for name, box in boxes.items()]
        return share_parameters(self._tensors, regions)
