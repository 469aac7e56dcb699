"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Hugging Face's half-split layout."""

from __future__ import annotations

import math

import torch

from megarl.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Return the angle per position of each pair of dimensions: [head_dim / 2], fp32.

    ``llama3`` scaling as in Llama 3.1 (arXiv:2407.21783): wavelengths above
    original_max / low_freq_factor are slowed by ``factor``, those below original_max / high_freq_factor are
    kept, those in between are interpolated.
    """
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inv_freq
        low = rope.original_max_position_embeddings / rope.low_freq_factor
        high = rope.original_max_position_embeddings / rope.high_freq_factor
        smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
        slowed = torch.where(wavelength > low, inv_freq / rope.factor, inv_freq)
        return torch.where((wavelength <= low) & (wavelength >= high), blended, slowed)
    return inv_freq


def _yarn(inv_freq: torch.Tensor, rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Return YaRN's frequencies (arXiv:2309.00071, section 3.2).

    Dimensions that turn more than ``beta_fast`` times in the original context keep their frequency, those
    that turn fewer than ``beta_slow`` times are slowed by ``factor``, with a linear ramp in between. Cosine
    and sine must be multiplied by ``rope.attention_factor``.
    """

    def dim_of(turns: float) -> float:
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low = max(math.floor(dim_of(rope.beta_fast)), 0)
    high = min(math.ceil(dim_of(rope.beta_slow)), head_dim - 1)
    width = high - low or 0.001  # equal bounds: a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def cos_sin(
    inv_freq: torch.Tensor, position_ids: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine times ``factor`` (RopeSpec.attention_factor): [T, 1, head_dim], fp32."""
    angles = position_ids.to(torch.float32)[:, None] * inv_freq[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * factor, angles.sin() * factor


def pair_halves(x: torch.Tensor) -> torch.Tensor:
    """Reorder interleaved pairs (0, 1), (2, 3) ... into halves for :func:`rotate`: evens before odds."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate q or k [T, heads, head_dim] by the angle of each token."""
    first, second = x.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated_half * sin).to(x.dtype)
