"""Assign sequences to microbatches, and microbatches to ranks.

The plan decides how long a step takes: ranks wait for the slowest one, so the balanced quantity is not the
number of tokens but the time they take, modelled as ``a * len + b * len^2`` (matrix products are linear in a
sequence's length, causal attention is quadratic).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megarl.errors import UserError
from megarl.ops._load import load_native

load_native()
from megarl import _C  # noqa: E402  after checking that this machine can load it


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of one sequence of ``len`` tokens: ``a * len + b * len^2``, in any unit.

    The default is a transformer of hidden size 2,048 (see :meth:`transformer`).
    """

    a: float = 1.0
    b: float = 1.0 / (12 * 2048)

    def __post_init__(self) -> None:
        assert min(self.a, self.b) >= 0, f"costs must not fall with length: {self}"
        assert self.a + self.b > 0, f"costs must grow with length: {self}"

    @classmethod
    def transformer(cls, hidden_size: int) -> CostModel:
        """Costs of a decoder, in units of one token's matrix products.

        A layer spends 24 H^2 FLOPs per token on matrices (12 H^2 parameters) and, with causal attention,
        2 H len per token on scores and values: the ratio of the two is len / (12 H).
        """
        return cls(a=1.0, b=1.0 / (12 * hidden_size))


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """Microbatches of every rank. ``microbatches[rank][i]`` lists indices into the caller's ``lengths``.

    Invariants, asserted when a plan is made: every sequence occurs exactly once; no microbatch exceeds the
    token budget, padding included; with equal counts all ranks have the same number of microbatches. The i-th
    microbatches of all ranks cost about the same; the most expensive come first. An empty microbatch (packed
    as a dummy sequence without loss) occurs only if there are fewer sequences than microbatches, and a rank
    with only empty ones only if there are fewer sequences than ranks.
    """

    microbatches: list[list[list[int]]]  # [num_ranks][num_microbatches][sequences]
    rank_costs: list[float]  # [num_ranks], in the unit of the cost model
    num_tokens: int  # over all ranks, padding included

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches of the rank with the most (equal on all ranks with equal counts)."""
        return max(len(rank) for rank in self.microbatches)

    @property
    def cost_imbalance(self) -> float:
        """Cost of the most expensive rank / mean over ranks: 1.0 is perfect, 1.1 wastes a tenth."""
        mean = sum(self.rank_costs) / len(self.rank_costs)
        return max(self.rank_costs) / mean if mean > 0 else 1.0


def plan_microbatches(
    lengths: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    num_ranks: int = 1,
    pad_to_multiple: int = 1,
    costs: CostModel = CostModel(),
    equal_counts: bool = True,
    microbatch_group_size: int = 1,
) -> PackingPlan:
    """Divide sequences into microbatches of at most ``max_tokens``, and these among data-parallel ranks.

    The number of microbatches is that of best-fit decreasing (within 1 % of total tokens / budget on real
    length distributions), rounded up to equal counts; costs are balanced over ranks and microbatches. The
    same arguments give the same plan on every machine, so ranks plan without communicating.

    Args:
        lengths: tokens per sequence, [n]; a list, or an array to avoid a conversion.
        max_tokens: token budget of one microbatch (packing.max_tokens_per_microbatch).
        num_ranks: data-parallel ranks.
        pad_to_multiple: every sequence is padded to a multiple of this, 2 * context_parallel_size.
        costs: cost model of a sequence.
        equal_counts: the same number of microbatches on every rank, which pipelines and collectives
            inside the microbatch loop (expert parallelism) need.
        microbatch_group_size: every rank's count is a multiple of it (Megatron's interleaved schedule
            needs a multiple of pipeline_parallel_size); needs equal_counts.

    Raises:
        UserError: a sequence is empty or longer than the budget.
    """
    assert min(max_tokens, num_ranks, pad_to_multiple, microbatch_group_size) > 0
    assert equal_counts or microbatch_group_size == 1, "groups of microbatches need equal counts"
    true_lengths = np.asarray(lengths, dtype=np.int64)
    padded = -(-true_lengths // pad_to_multiple) * pad_to_multiple
    _check_lengths(true_lengths, padded, max_tokens, pad_to_multiple)
    indices, offsets, rank_counts = _C.plan_microbatches(
        padded,
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        group=microbatch_group_size,
        equal_counts=equal_counts,
        a=costs.a,
        b=costs.b,
    )
    rank_ends = np.concatenate([[0], rank_counts.cumsum()])
    _assert_invariants(padded[indices], indices, offsets, max_tokens)
    _assert_counts(rank_counts, equal_counts, microbatch_group_size, offsets[rank_ends])
    per_sequence = costs.a * padded + costs.b * (padded * padded)
    rank_costs = _sums(per_sequence[indices], offsets[rank_ends])
    ranks = _nested_lists(indices, offsets, rank_ends)
    return PackingPlan(ranks, rank_costs.tolist(), int(padded.sum()))


def plan_groups(
    lengths: Sequence[int] | np.ndarray,
    *,
    group_size: int,
    max_tokens: int,
    num_ranks: int = 1,
    pad_to_multiple: int = 1,
    costs: CostModel = CostModel(),
    microbatch_group_size: int = 1,
) -> PackingPlan:
    """See plan_microbatches, with equal counts; ``group_size`` consecutive sequences share a microbatch.

    Sequences 0 to group_size - 1 are the first group, and so on: preference pairs, whose loss needs both
    responses together. Groups stay in order inside a microbatch.

    Raises:
        UserError: a sequence is empty, or a group longer than the budget.
    """
    if group_size == 1:
        return plan_microbatches(
            lengths,
            max_tokens=max_tokens,
            num_ranks=num_ranks,
            pad_to_multiple=pad_to_multiple,
            costs=costs,
            microbatch_group_size=microbatch_group_size,
        )
    true_lengths = np.asarray(lengths, dtype=np.int64).reshape(-1, group_size)
    padded = -(-true_lengths // pad_to_multiple) * pad_to_multiple
    totals = padded.sum(axis=1)
    if (true_lengths <= 0).any():
        empty = int(np.flatnonzero(true_lengths.ravel() <= 0)[0])
        raise UserError(f"sequence {empty} has no tokens; packing needs at least 1")
    if (totals > max_tokens).any():
        group = int(np.flatnonzero(totals > max_tokens)[0])
        parts = " + ".join(str(length) for length in padded[group].tolist())
        raise UserError(
            f"sequences {group * group_size} to {(group + 1) * group_size - 1} have {parts} tokens, and must "
            f"share a microbatch of packing.max_tokens_per_microbatch = {max_tokens}"
        )
    # Equal parts of a group cost a * total + (b / group_size) * total^2 together.
    plan = plan_microbatches(
        totals,
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        costs=CostModel(costs.a, costs.b / group_size),
        microbatch_group_size=microbatch_group_size,
    )
    members = [
        [[group * group_size + i for group in batch for i in range(group_size)] for batch in rank]
        for rank in plan.microbatches
    ]
    return PackingPlan(members, plan.rank_costs, plan.num_tokens)


def _nested_lists(indices: np.ndarray, offsets: np.ndarray, rank_ends: np.ndarray) -> list[list[list[int]]]:
    # A million sequences make 100,000 lists; the cycle collector would scan the whole heap again and again,
    # for half of the planner's time. Lists of ints form no cycles.
    collecting = gc.isenabled()
    gc.disable()
    flat = indices.tolist()
    microbatches = [flat[i:j] for i, j in pairwise(offsets.tolist())]
    if collecting:
        gc.enable()
    return [microbatches[i:j] for i, j in pairwise(rank_ends.tolist())]


def _check_lengths(lengths: np.ndarray, padded: np.ndarray, max_tokens: int, multiple: int) -> None:
    bad = np.flatnonzero((lengths <= 0) | (padded > max_tokens))
    if bad.size == 0:
        return
    index = int(bad[0])
    length = int(lengths[index])
    if length <= 0:
        raise UserError(f"sequence {index} has {length} tokens; packing needs at least 1")
    padding = f" ({int(padded[index])} padded to a multiple of {multiple})" if multiple > 1 else ""
    raise UserError(
        f"sequence {index} has {length} tokens{padding}, more than "
        f"packing.max_tokens_per_microbatch = {max_tokens}"
    )


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum values between consecutive bounds, empty ranges included."""
    return np.diff(np.concatenate([[0], values.cumsum()])[bounds])


def _assert_invariants(packed: np.ndarray, indices: np.ndarray, offsets: np.ndarray, max_tokens: int) -> None:
    seen = np.zeros(len(indices), dtype=bool)
    seen[indices] = True
    assert seen.all(), "every sequence exactly once"
    assert offsets[0] == 0, "microbatches begin with the first sequence"
    assert offsets[-1] == len(indices), "and end with the last"
    assert not len(offsets) > 1 or _sums(packed, offsets).max() <= max_tokens, "token budget"


def _assert_counts(rank_counts: np.ndarray, equal_counts: bool, group: int, rank_bounds: np.ndarray) -> None:
    assert not equal_counts or len(set(rank_counts.tolist())) == 1, f"equal counts, found {rank_counts}"
    assert not (rank_counts % group).any(), f"groups of {group}, found {rank_counts}"
    if rank_bounds[-1] >= len(rank_counts):
        assert np.diff(rank_bounds).min() > 0, "no idle rank"
