"""Reward penalties, KL in the reward, whole-batch standardisation and clipping of advantages.

Everything is float64. Advantages are per sequence [S] or per token [T]; averages over tokens also take
``counts``, the number of target tokens each value stands for.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def overlong_penalty(num_tokens: np.ndarray, *, max_tokens: int, buffer: int) -> np.ndarray:
    """Return DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) of ``num_tokens`` [S].

    0 up to ``max_tokens - buffer`` tokens, then falling linearly to -1 at ``max_tokens``.
    """
    return 0.0 - np.clip((num_tokens - (max_tokens - buffer)) / buffer, 0.0, 1.0)


def add_kl_to_go(advantages: np.ndarray, kl: np.ndarray, offsets: np.ndarray, coef: float) -> np.ndarray:
    """Return advantages [T], ``A_t = A - coef * sum_{j >= t} kl_j``, undiscounted (arXiv:2501.03262).

    Args:
        advantages: [S].
        kl: [T], the KL estimate of every target, 0 elsewhere.
        offsets: [S + 1] of the sequences in ``kl``.
        coef: weight of the KL.
    """
    found = np.empty(len(kl))
    for advantage, (start, end) in zip(advantages.tolist(), pairwise(offsets.tolist()), strict=True):
        found[start:end] = advantage - coef * np.cumsum(kl[start:end][::-1])[::-1]
    return found


def standardize(advantages: np.ndarray, counts: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """Return ``(A - mean) / (std + epsilon)`` over all target tokens (Reinforce++, arXiv:2501.03262).

    The deviation has divisor N, the number of tokens. Where all values are equal the result is exactly 0.
    """
    used, total = advantages[counts > 0], counts.sum()
    if not len(used) or used.min() == used.max():
        return np.zeros_like(advantages)
    mean = (advantages * counts).sum() / total
    deviation = np.sqrt((counts * (advantages - mean) ** 2).sum() / total)
    standardized: np.ndarray = (advantages - mean) / (deviation + epsilon)
    return standardized


def clip_advantages(advantages: np.ndarray, counts: np.ndarray, bound: float) -> tuple[np.ndarray, float]:
    """Clip advantages to [-bound, bound]; also return the share of target tokens that this changes."""
    clipped = np.clip(advantages, -bound, bound)
    total = int(counts.sum())
    return clipped, float(counts[clipped != advantages].sum() / total) if total else 0.0
