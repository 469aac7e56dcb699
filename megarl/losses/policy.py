"""The clipped policy-gradient loss of PPO and GRPO, with an optional KL to a reference.

For each token, with r = exp(cur - old) and advantage A (PPO: Schulman et al. 2017, arXiv:1707.06347;
clip-higher: DAPO, arXiv:2503.14476)::

    L = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)) + beta * KL

KL estimators with d = ref - cur (Schulman 2020, "Approximating KL divergence")::

    k1 = -d      k2 = d^2 / 2      k3 = e^d - 1 - d

Their plain gradients are used: of k3 that is 1 - e^d, which is not the score-function gradient of
the reverse KL (cur - ref, the gradient of k2); of k1 it is 1, whose expectation is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megarl.losses.base import LossResult, LossTokens

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(cur: torch.Tensor, ref: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Per-token estimate [N] of KL(cur || ref) from tokens drawn from cur."""
    d = ref - cur
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return torch.expm1(d) - d


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Configured loss; ``old_logprobs`` None means that these very logprobs are the old ones (ratio 1)."""

    clip_ratio_low: float
    clip_ratio_high: float
    kl_coef: float
    kl_estimator: KlEstimator

    def __call__(self, tokens: LossTokens) -> LossResult:
        """Loss with gradient to ``tokens.logprobs``; sums as logged (each already a global mean)."""
        assert tokens.advantages is not None
        w, cur, advantage = tokens.weights, tokens.logprobs, tokens.advantages
        old = cur.detach() if tokens.old_logprobs is None else tokens.old_logprobs
        log_ratio = cur - old
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_ratio_low, 1 + self.clip_ratio_high)
        unclipped_loss, clipped_loss = -advantage * ratio, -advantage * clipped
        loss = (w * torch.maximum(unclipped_loss, clipped_loss)).sum()
        with torch.no_grad():
            sums = {
                "policy_loss": loss.detach(),
                "weight": w.sum(),
                "advantage_mean": (w * advantage).sum(),
                "ratio_mean": (w * ratio).sum(),
                "kl_policy": (w * (ratio - 1 - log_ratio)).sum(),
                "clip_fraction": (w * (clipped_loss > unclipped_loss)).sum(),
                "entropy": (w * tokens.entropy).sum(),
            }
            maxima = {"ratio_max": ratio.max()}
        if self.kl_coef > 0:
            assert tokens.ref_logprobs is not None
            kl = (w * kl_estimate(cur, tokens.ref_logprobs, self.kl_estimator)).sum()
            sums["kl_ref"] = kl.detach()
            loss = loss + self.kl_coef * kl
        return LossResult(loss, sums, maxima)
