"""Checksums that compare the engine's weights with the trainer's, each computed where its region is stored.

A checksum is the sum of the elements' bit patterns, each times an odd number that depends on its position,
modulo 2^64: changing one element always changes it, exchanging elements nearly always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megarl.weights.sync_plan import SourceView, Storage

_CHUNK = 1 << 18  # elements at a time, to keep temporaries at a few MiB
_STEP = 0x1E3779B97F4A7C15  # no pattern in its bits; twice it still fits a signed 64-bit integer
_BITS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True, slots=True)
class RegionChecksum:
    """The checksum of ``param[index]`` of the engine, whose elements have type ``dtype``."""

    param: str
    index: tuple[int | tuple[int, int], ...]
    dtype: str
    value: int


@dataclass(frozen=True, slots=True)
class RegionQuery:
    """A region of a trainer's memory whose checksum, as ``dtype``, is requested.

    It is in ``storage`` or, if that is None, in a storage of trainer rank ``rank``.
    """

    source: SourceView
    dtype: str
    storage: Storage | None
    rank: int = -1


def region_checksum(tensor: torch.Tensor, dtype: str | None = None) -> int:
    """Return the checksum of a tensor's elements in row-major order, converted to ``dtype`` if given."""
    total = 0
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part = part.to(getattr(torch, dtype)) if dtype is not None else part
        bits = part.contiguous().view(_BITS[part.element_size()]).long()
        position = torch.arange(start, start + bits.numel(), device=bits.device)
        total += int((bits * (position * (2 * _STEP) + 1)).sum())
    return total % (1 << 64)
