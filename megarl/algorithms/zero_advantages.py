"""Samples whose advantage is exactly 0 have no gradient: they are counted, and not computed.

A group whose rewards are all equal gets advantages of exactly 0, and with them every term of the policy loss
and its derivative is 0. :attr:`megarl.config.grpo.GrpoConfig.why_zero_advantages_train` says where something
else makes such samples count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_SUMS = ("loss", "policy_loss", "advantage_mean")  # to which a sample with advantage 0 adds 0


def with_gradient(advantages: np.ndarray, num_targets: np.ndarray) -> np.ndarray:
    """Which of the sequences [S] an optimizer step computes: those with an advantage, or all if none has one.

    A step without any gradient still moves the weights, by Adam's momentum, and still compares engine and
    trainer: it is taken as it is.
    """
    found = np.flatnonzero((advantages != 0) & (num_targets > 0))
    return found if len(found) else np.arange(len(advantages))


def computed_share(weights: np.ndarray, num_targets: np.ndarray, only: np.ndarray) -> float:
    """Share of all weights in the loss that sequences ``only`` have; ``weights`` [S]: of one target."""
    whole = weights * num_targets
    return float(whole[only].sum() / (whole.sum() or 1.0))


def over_all_samples(metrics: dict[str, Any], share: float, *, is_mean: bool) -> dict[str, Any]:
    """Weighed figures of an optimizer step that computed ``share`` of its weights, for all its samples.

    Loss and advantage are exact, for what is missing adds 0; the entropy is that of the computed tokens.

    Args:
        metrics: as reduce_results makes them.
        share: from computed_share.
        is_mean: whether reduce_results divided by the computed weights; else these are sums.
    """
    if is_mean:
        return metrics | {name: metrics[name] * share for name in _SUMS}
    return metrics | {"entropy": metrics["entropy"] / share}
