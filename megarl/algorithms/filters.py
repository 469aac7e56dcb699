"""Sample filters and weights: which samples an optimizer step trains on, apart from advantages.

A sequence removed from the loss keeps no targets; the denominators of all terms are recomputed without it.
Samples whose advantage is exactly 0 still count in the denominators. Every term of the policy loss and its
gradient is 0 for them, so their forward and backward passes are skipped
(:attr:`megarl.config.grpo.GrpoConfig.why_zero_advantages_train` lists the settings under which they matter).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megarl.batching.rank_microbatches import gather_from_packed, reweight
from megarl.cluster.collectives import from_first_rank
from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.loops import minibatches
from megarl.loops.minibatches import MiniBatch
from megarl.losses.base import Aggregation, token_weights
from megarl.records import PackedBatch

_SUMS = ("loss", "policy_loss", "advantage_mean")  # a sample with advantage 0 adds 0 to these


def drop_by_error(
    minis: list[MiniBatch], bound: float | None, aggregation: Aggregation, fixed_length: int
) -> dict[str, float]:
    """Remove sequences with mean |old - rollout logprob| above ``bound`` from the loss; return counts."""
    if bound is None:
        return {}
    return {"dropped_logprob_error": sum(_drop(mini, bound, aggregation, fixed_length) for mini in minis)}


def _drop(mini: MiniBatch, bound: float, aggregation: Aggregation, fixed_length: int) -> int:
    errors, counts = gather_from_packed(mini.packed, _logprob_error), mini.num_targets

    def drop() -> int:
        sums = np.array([errors[start:end].sum() for start, end in pairwise(mini.batch.offsets.tolist())])
        dropped = np.flatnonzero(sums > bound * counts)
        counts[dropped] = 0
        for row in dropped.tolist():
            mini.samples[row].info["dropped"] = "logprob_error"
        return len(dropped)

    count: int = from_first_rank(drop)
    if count:
        reweight(mini.packed, mini.num_targets, aggregation, fixed_length)
    return count


def _logprob_error(batch: PackedBatch) -> torch.Tensor:
    return _drift(batch).abs()


def _drift(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    return batch.old_logprobs - batch.rollout_logprobs


def drop_rejected(
    minis: list[MiniBatch], algorithm: GrpoAlgorithmConfig, aggregation: Aggregation, fixed_length: int
) -> dict[str, float]:
    """With off_policy_denominators "kept": take what the correction's mask rejects out of the loss.

    The share of the targets that it was. verl's rejection (rollout_rs) with the means of what is left.
    """
    if algorithm.off_policy_denominators == "all":
        return {}
    found = [_reject(mini, algorithm, aggregation, fixed_length) for mini in minis]
    rejected, targets = (sum(each) for each in zip(*found, strict=True)) if found else (0, 0)
    return {"rejected_fraction": rejected / max(targets, 1)}


def _reject(
    mini: MiniBatch, algorithm: GrpoAlgorithmConfig, aggregation: Aggregation, fixed_length: int
) -> tuple[int, int]:
    """Return the numbers of rejected and of all targets."""
    drift, kept = gather_from_packed(mini.packed, _drift), np.zeros(0, dtype=bool)

    def reject() -> tuple[int, int]:
        nonlocal kept
        bounds, counts = list(pairwise(mini.batch.offsets.tolist())), mini.num_targets
        by_token, before = drift, int(counts.sum())
        if algorithm.off_policy_correction.startswith("sequence"):
            sums = np.array([drift[start:end].sum() for start, end in bounds])
            mean = algorithm.off_policy_sequence_weight == "geometric_mean"
            by_token = np.repeat(sums / np.maximum(counts, 1) if mean else sums, mini.batch.lengths)
        ratios = np.exp(by_token)
        assert algorithm.off_policy_low is not None
        assert algorithm.off_policy_high is not None
        inside = (ratios >= algorithm.off_policy_low) & (ratios <= algorithm.off_policy_high)
        kept = inside & mini.targets()
        left = np.array([kept[start:end].sum() for start, end in bounds], dtype=counts.dtype)
        for row in np.flatnonzero((left == 0) & (counts > 0)).tolist():
            mini.samples[row].info["dropped"] = "off_policy"
        counts[:] = left
        return before - int(left.sum()), before

    counted: tuple[int, int] = from_first_rank(reject)
    if counted[0]:
        reweight(mini.packed, mini.num_targets, aggregation, fixed_length, kept)
    return counted


def weigh_positives(minis: list[MiniBatch]) -> dict[str, float]:
    """Set VAPO's likelihood weights, 1 / (tokens of full-reward samples); return such samples' share."""
    full = [np.array([(s.reward or 0.0) >= 1.0 for s in mini.samples], dtype=bool) for mini in minis]
    counts = [np.where(good, mini.num_targets, 0) for mini, good in zip(minis, full, strict=True)]
    minibatches.scatter(minis, "nll_weights", [token_weights(each, "token") for each in counts])
    share: float = from_first_rank(lambda: int(sum(map(sum, full))) / max(sum(map(len, full)), 1))
    return {"positive_fraction": share}


def leave_out_zeros(minis: list[MiniBatch]) -> int:
    """Pack only sequences with a nonzero advantage; return how many are left out (rank 0).

    If a mini-batch has none, all its sequences are packed: a step with a zero gradient still moves the
    weights by Adam's momentum, and still measures the mismatch of engine and trainer.
    """
    skipped = 0
    for mini in minis:
        assert mini.advantages is not None
        only = np.flatnonzero((mini.advantages != 0) & (mini.num_targets > 0))
        if 0 < len(only) < len(mini.samples):
            mini.only = only
            skipped += len(mini.samples) - len(only)
    return skipped


def with_targets(
    minis: list[MiniBatch], aggregation: Aggregation, fixed_length: int
) -> list[tuple[MiniBatch, float]]:
    """Return the mini-batches with a target in the loss, each with the packed share of its weights."""

    def share(mini: MiniBatch) -> float:
        counts = mini.num_targets
        if mini.only is None or not counts.any():
            return float(counts.any())
        whole = token_weights(counts, aggregation, fixed_length) * counts
        return float(whole[mini.only].sum() / (whole.sum() or 1.0))

    shares: list[float] = from_first_rank(lambda: [share(mini) for mini in minis])
    return [(mini, packed) for mini, packed in zip(minis, shares, strict=True) if packed > 0]


def over_all_samples(metrics: dict[str, Any], share: float, *, is_mean: bool) -> dict[str, Any]:
    """Rescale weighted metrics of a step that computed ``share`` of its weights to all its samples.

    Loss and advantage are exact, since skipped samples add 0; the entropy covers the computed tokens only.
    ``is_mean`` says whether reduce_results divided by the computed weights; otherwise the values are sums.
    """
    if share == 1:
        return metrics
    if is_mean:
        return metrics | {name: metrics[name] * share for name in _SUMS}
    return metrics | {"entropy": metrics["entropy"] / share}
