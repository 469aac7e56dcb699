"""Weights in FP8 with one scale per block, as DeepSeek-V3 is published (arXiv:2412.19437, section 3.3).

The weight of row i and column j is the stored number times ``scale[i // rows, j // columns]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

STORED = "F8_E4M3"
"""safetensors' name of the type."""
_SCALE_TYPES = ("F32", "BF16", "F16")


class BlockScaled:
    """A tensor of a safetensors file that is dequantised as its parts are read.

    Args:
        numbers: the slice of the stored numbers [m, n].
        scales: the slice of their scales [ceil(m / rows), ceil(n / columns)].
        block: (rows, columns).
    """

    def __init__(self, numbers: Any, scales: Any, block: tuple[int, int]) -> None:
        self._numbers, self._scales, self._block = numbers, scales, block

    def get_shape(self) -> list[int]:
        """Return [m, n]."""
        return list(self._numbers.get_shape())

    def get_dtype(self) -> str:
        """Return the type that the weights were rounded from, in safetensors' words."""
        return "BF16"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return a part, which slices select, in float32."""
        parts = index if isinstance(index, tuple) else (index,)
        parts = (*parts, *[slice(None)] * (2 - len(parts)))
        spans = [part.indices(size)[:2] for part, size in zip(parts, self.get_shape(), strict=True)]
        numbers: torch.Tensor = self._numbers[tuple(slice(*span) for span in spans)]
        blocks = [
            (start // n, math.ceil(stop / n)) for (start, stop), n in zip(spans, self._block, strict=True)
        ]
        scales: torch.Tensor = self._scales[tuple(slice(*span) for span in blocks)].float()
        for dim, ((start, stop), (first, _), n) in enumerate(zip(spans, blocks, self._block, strict=True)):
            scales = scales.index_select(dim, torch.arange(start, stop) // n - first)
        return numbers.float() * scales


def pair_problem(numbers: Any, scales: Any, block: tuple[int, int]) -> str | None:
    """Return what is wrong with an FP8 tensor and its scales; None if nothing is."""
    shape = list(numbers.get_shape())
    if len(shape) != 2:
        return f"FP8 weights have two dimensions (got shape {shape})"
    expected = [math.ceil(size / n) for size, n in zip(shape, block, strict=True)]
    if (found := list(scales.get_shape())) != expected:
        return f"its scales have shape {found}, expected {expected} for blocks of {block[0]} x {block[1]}"
    if (kind := scales.get_dtype()) not in _SCALE_TYPES:
        return f"its scales have type {kind} (known: {', '.join(_SCALE_TYPES)})"
    return None
