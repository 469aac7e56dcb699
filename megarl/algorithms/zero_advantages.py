"""Samples whose advantage is exactly 0 have no gradient: they are counted, and not computed.

A group whose rewards are all equal gets advantages of exactly 0, and with them every term of the policy loss
and its derivative is 0. :attr:`megarl.config.grpo.GrpoConfig.why_zero_advantages_train` says where something
else makes such samples count.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from megarl.losses.base import Aggregation, token_weights
from megarl.packing.token_values import Array
from megarl.records import Sequence

_SUMS = ("loss", "policy_loss", "advantage_mean")  # to which a sample with advantage 0 adds 0


def with_gradient(advantages: SequenceOf[Array]) -> list[int]:
    """Which sequences an optimizer step computes: those with an advantage, or all where none has one.

    A step without any gradient still moves the weights, by Adam's momentum, and still compares engine and
    trainer: it is taken as it is.
    """
    found = [i for i, own in enumerate(advantages) if own.any()]
    return found or list(range(len(advantages)))


def computed_share(
    sequences: list[Sequence], only: list[int], aggregation: Aggregation, fixed_length: int
) -> float:
    """Share of the weights of all ``sequences`` in the loss that ``only`` has."""
    weights = token_weights(sequences, aggregation, fixed_length)
    whole = [weight * sum(s.loss_mask[1:]) for weight, s in zip(weights, sequences, strict=True)]
    return sum(whole[i] for i in only) / (sum(whole) or 1.0)


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
