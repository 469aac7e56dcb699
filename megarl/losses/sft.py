"""Supervised fine-tuning: cross-entropy of the response tokens."""

from __future__ import annotations

from megarl.losses.base import LossResult, LossTokens


def sft_loss(tokens: LossTokens) -> LossResult:
    """Return ``-sum_t weight_t * log p(label_t)``; with weights 1 / T, the mean over the step's targets."""
    loss = -(tokens.weights * tokens.logprobs).sum()
    detached = loss.detach()
    return LossResult(
        loss,
        {
            "loss": detached,
            "entropy": (tokens.weights * tokens.entropy.detach()).sum(),
            "weight": tokens.weights.sum(),
        },
    )
