"""Which samples an optimizer step learns from, and how much each counts, beside the advantages.

A sequence that is taken out of the loss has no targets in it any more: the denominators of all terms are made
anew without it. Samples whose advantage is exactly 0 are another thing: they count in the denominators, but
every term of the policy loss and its gradient is 0 for them, so they are not computed
(:attr:`megarl.config.grpo.GrpoConfig.why_zero_advantages_train` says where something makes them count).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megarl.algorithms.parts import Part, scatter_parts
from megarl.losses.base import Aggregation, token_weights
from megarl.records import PackedBatch
from megarl.trainer.batches import gather_from_packed, weigh_anew
from megarl.trainer.control import from_first_rank

_SUMS = ("loss", "policy_loss", "advantage_mean")  # to which a sample with advantage 0 adds 0


def drop_by_error(
    parts: list[Part], bound: float | None, aggregation: Aggregation, fixed_length: int
) -> dict[str, float]:
    """Take sequences out of the loss whose mean |old - rollout logprob| is above ``bound``; counts them."""
    if bound is None:
        return {}
    return {"dropped_logprob_error": sum(_drop(part, bound, aggregation, fixed_length) for part in parts)}


def _drop(part: Part, bound: float, aggregation: Aggregation, fixed_length: int) -> int:
    errors, counts = gather_from_packed(part.packed, _logprob_error), part.num_targets

    def drop() -> int:
        sums = np.array([errors[start:end].sum() for start, end in pairwise(part.batch.offsets.tolist())])
        dropped = np.flatnonzero(sums > bound * counts)
        counts[dropped] = 0
        for row in dropped.tolist():
            part.samples[row].info["dropped"] = "logprob_error"
        return len(dropped)

    count: int = from_first_rank(drop)
    if count:
        weigh_anew(part.packed, part.num_targets, aggregation, fixed_length)
    return count


def _logprob_error(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    return (batch.old_logprobs - batch.rollout_logprobs).abs()


def weigh_positives(parts: list[Part]) -> dict[str, float]:
    """Weights 1 / (tokens with full marks) for the likelihood term (VAPO), and the share of such samples."""
    full = [np.array([(s.reward or 0.0) >= 1.0 for s in part.samples], dtype=bool) for part in parts]
    counts = [np.where(good, part.num_targets, 0) for part, good in zip(parts, full, strict=True)]
    scatter_parts(parts, "nll_weights", [token_weights(each, "token") for each in counts])
    share: float = from_first_rank(lambda: int(sum(map(sum, full))) / max(sum(map(len, full)), 1))
    return {"positive_fraction": share}


def leave_out_zeros(parts: list[Part]) -> int:
    """Have only sequences packed that have an advantage; how many are not (rank 0).

    Of a part in which none has one, all are packed: a step without any gradient still moves the weights, by
    Adam's momentum, and still compares engine and trainer.
    """
    skipped = 0
    for part in parts:
        assert part.advantages is not None
        only = np.flatnonzero((part.advantages != 0) & (part.num_targets > 0))
        if 0 < len(only) < len(part.samples):
            part.only = only
            skipped += len(part.samples) - len(only)
    return skipped


def with_targets(parts: list[Part], aggregation: Aggregation, fixed_length: int) -> list[tuple[Part, float]]:
    """The parts that have a target in the loss, each with the share of its weights that is packed."""

    def share(part: Part) -> float:
        counts = part.num_targets
        if part.only is None or not counts.any():
            return float(counts.any())
        whole = token_weights(counts, aggregation, fixed_length) * counts
        return float(whole[part.only].sum() / (whole.sum() or 1.0))

    shares: list[float] = from_first_rank(lambda: [share(part) for part in parts])
    return [(part, own) for part, own in zip(parts, shares, strict=True) if own > 0]


def over_all_samples(metrics: dict[str, Any], share: float, *, is_mean: bool) -> dict[str, Any]:
    """Weighed figures of an optimizer step that computed ``share`` of its weights, for all its samples.

    Loss and advantage are exact, for what is missing adds 0; the entropy is that of the computed tokens.
    ``is_mean`` says whether reduce_results divided by the computed weights; else these are sums.
    """
    if share == 1:
        return metrics
    if is_mean:
        return metrics | {name: metrics[name] * share for name in _SUMS}
    return metrics | {"entropy": metrics["entropy"] / share}
