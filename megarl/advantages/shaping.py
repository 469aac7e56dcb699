"""Rewards before and advantages after the group: penalties, KL in the reward, whole-batch standardisation.

Everything is plain float64 on Python lists and numpy arrays: the figures of one step are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) of a response of ``num_tokens``.

    0 up to ``max_tokens - buffer``, from there falling linearly to -1 at ``max_tokens``.
    """
    excess = num_tokens - (max_tokens - buffer)
    return -min(max(excess, 0) / buffer, 1.0)


def add_kl_to_go(advantages: Sequence[float], kls: Sequence[Array], coef: float) -> list[Array]:
    """Per-token advantages ``A_t = A - coef * sum_{j >= t} kl_j``, undiscounted (arXiv:2501.03262).

    ``kls`` [S] of [N]: the KL estimate of every target of a sequence, in order; ``advantages`` [S].
    """
    return [
        advantage - coef * np.cumsum(kl[::-1])[::-1] for advantage, kl in zip(advantages, kls, strict=True)
    ]


def standardize(advantages: Sequence[Array], epsilon: float = 1e-6) -> list[Array]:
    """``(A - mean) / (std + epsilon)`` over all tokens of all sequences (Reinforce++, arXiv:2501.03262).

    The deviation has divisor N, the number of tokens. Where all values are equal the result is exactly 0.
    """
    flat = np.concatenate(advantages) if advantages else np.zeros(0)
    if not len(flat) or flat.min() == flat.max():
        return [np.zeros_like(a) for a in advantages]
    mean, deviation = flat.mean(), flat.std()
    return [(a - mean) / (deviation + epsilon) for a in advantages]


def clip_advantages(advantages: Sequence[Array], bound: float) -> tuple[list[Array], float]:
    """Advantages within [-bound, bound], and the share of tokens for which that is a change."""
    clipped = [np.clip(a, -bound, bound) for a in advantages]
    total = sum(len(a) for a in advantages)
    changed = sum(int((a != c).sum()) for a, c in zip(advantages, clipped, strict=True))
    return clipped, changed / total if total else 0.0
