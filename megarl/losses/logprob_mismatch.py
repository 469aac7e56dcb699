"""Mismatch of the engine's and the trainer's logprobs for the same tokens and weights.

Check it first when RL fails: engine and trainer must be the same policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class WorstToken:
    """The token with the largest mismatch."""

    difference: float
    sequence_id: int
    label: int
    trainer_logprob: float
    rollout_logprob: float


@dataclass(slots=True)
class LogprobMismatch:
    """Sums over tokens; merge over microbatches and ranks with ``+``."""

    num_tokens: int = 0
    abs_diff_sum: float = 0.0
    kl_sum: float = 0.0  # k3 estimate of KL(rollout || trainer), tokens drawn from the engine
    worst: WorstToken | None = None
    num_stale: int = 0  # tokens drawn by older weights, excluded from the sums above
    stale_abs_diff_sum: float = 0.0
    stale_kl_sum: float = 0.0

    def __add__(self, other: LogprobMismatch) -> LogprobMismatch:
        candidates = [w for w in (self.worst, other.worst) if w is not None]
        return LogprobMismatch(
            self.num_tokens + other.num_tokens,
            self.abs_diff_sum + other.abs_diff_sum,
            self.kl_sum + other.kl_sum,
            max(candidates, key=lambda w: (math.isnan(w.difference), w.difference), default=None),
            self.num_stale + other.num_stale,
            self.stale_abs_diff_sum + other.stale_abs_diff_sum,
            self.stale_kl_sum + other.stale_kl_sum,
        )

    def metrics(self) -> dict[str, float]:
        """Return logprob_abs_diff_mean and _max, kl_rollout_trainer, and those of stale tokens, if any."""
        count = max(self.num_tokens, 1)
        stale = {
            "stale_logprob_abs_diff_mean": self.stale_abs_diff_sum / max(self.num_stale, 1),
            "stale_kl_rollout_trainer": self.stale_kl_sum / max(self.num_stale, 1),
        }
        return (stale if self.num_stale else {}) | {
            "logprob_abs_diff_mean": self.abs_diff_sum / count,
            "logprob_abs_diff_max": self.worst.difference if self.worst else 0.0,
            "kl_rollout_trainer": self.kl_sum / count,
        }


def measure_mismatch(
    trainer: torch.Tensor,
    rollout: torch.Tensor,
    labels: torch.Tensor,
    sequence_ids: torch.Tensor,
    stale: torch.Tensor | None = None,
) -> LogprobMismatch:
    """Compare logprobs [N] of the same tokens, computed with the same weights and temperature.

    Tokens drawn by older weights (``stale`` [N] not 0) also differ by the updates since; they are summed
    separately.
    """
    if trainer.numel() == 0:
        return LogprobMismatch()
    trainer = trainer.detach().double()
    d = trainer - rollout.double()
    difference, kl = d.abs(), torch.expm1(d) - d
    old = torch.zeros_like(d, dtype=torch.bool) if stale is None else stale != 0
    at = torch.where(old, -1.0, difference).argmax()  # of the current tokens, if there are any
    at_worst = [x.take(at) for x in (difference, sequence_ids, labels, trainer, rollout)]  # x[at] waits
    sums = [torch.where(left_out, 0.0, x).sum() for left_out in (old, ~old) for x in (difference, kl)]
    # In one copy: each would wait for the device.
    values = torch.stack([value.double() for value in (*at_worst, old.sum(), *sums)]).tolist()
    num_stale, abs_diff_sum, kl_sum, stale_abs_diff_sum, stale_kl_sum = values[5:]
    num_tokens = d.numel() - int(num_stale)
    worst = WorstToken(values[0], int(values[1]), int(values[2]), values[3], values[4])
    return LogprobMismatch(
        num_tokens,
        abs_diff_sum,
        kl_sum,
        worst if num_tokens else None,
        int(num_stale),
        stale_abs_diff_sum,
        stale_kl_sum,
    )
