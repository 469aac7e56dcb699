"""Which sequences share a microbatch, and which rank computes it.

The plan decides how long a step takes: ranks wait for the costliest one, so what must be equal over
ranks is not the number of tokens but the time they take, modelled as ``a * len + b * len^2`` (matrix
products are linear in a sequence's length, causal attention is quadratic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megarl.errors import UserError
from megarl.ops.reference_packing import plan_reference


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of one sequence of ``len`` tokens: ``a * len + b * len^2``, in any unit.

    The default is a transformer of hidden size 2,048 (see :meth:`transformer`).
    """

    a: float = 1.0
    b: float = 1.0 / (12 * 2048)

    def __post_init__(self) -> None:
        assert self.a >= 0 and self.b >= 0 and self.a + self.b > 0, f"costs must grow with length: {self}"

    @classmethod
    def transformer(cls, hidden_size: int) -> CostModel:
        """Costs of a decoder, in units of one token's matrix products.

        A layer spends 24 H^2 FLOPs per token on matrices (12 H^2 parameters) and, with causal attention,
        2 H len per token on scores and values: the ratio of the two is len / (12 H).
        """
        return cls(a=1.0, b=1.0 / (12 * hidden_size))


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """Microbatches of every rank. ``microbatches[rank][i]`` lists positions in the caller's ``lengths``.

    Invariants, asserted when a plan is made: every sequence occurs exactly once; no microbatch exceeds
    the token budget, padding included; with equal counts all ranks have the same number of microbatches.
    The i-th microbatches of all ranks cost about the same; the costliest come first. An empty microbatch
    (pack gives a dummy sequence without loss for it) occurs only where there are fewer sequences than
    microbatches, and a rank with nothing else only where there are fewer sequences than ranks.
    """

    microbatches: list[list[list[int]]]  # [num_ranks][num_microbatches][sequences]
    rank_costs: list[float]  # [num_ranks], in the unit of the cost model
    num_tokens: int  # over all ranks, padding included

    @property
    def num_microbatches(self) -> int:
        """Microbatches of the rank that has most (all have as many with equal counts)."""
        return max(len(rank) for rank in self.microbatches)

    @property
    def cost_imbalance(self) -> float:
        """Cost of the costliest rank / mean over ranks: 1.0 is perfect, 1.1 wastes a tenth of the machine."""
        mean = sum(self.rank_costs) / len(self.rank_costs)
        return max(self.rank_costs) / mean if mean > 0 else 1.0


def plan_microbatches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_ranks: int = 1,
    pad_to_multiple: int = 1,
    costs: CostModel = CostModel(),
    equal_counts: bool = True,
    microbatch_group_size: int = 1,
) -> PackingPlan:
    """Divide sequences into microbatches of at most ``max_tokens`` and those among data-parallel ranks.

    As few microbatches as best-fit decreasing finds (within 1 % of total tokens / budget on real length
    distributions), rounded up to equal counts; costs balanced over ranks and microbatches. The same
    arguments give the same plan on every machine, so ranks plan for themselves and need not talk.

    Args:
        lengths: tokens per sequence, [n]; a list, or an array to spare the conversion.
        max_tokens: token budget of one microbatch (packing.max_tokens_per_microbatch).
        num_ranks: data-parallel ranks.
        pad_to_multiple: every sequence is padded to a multiple of this, 2 * context_parallel_size.
        costs: what a sequence costs.
        equal_counts: the same number of microbatches on every rank, which pipelines and collectives
            inside the microbatch loop (expert parallelism) need.
        microbatch_group_size: every rank's count is a multiple of it (Megatron's interleaved schedule
            wants a multiple of pipeline_parallel_size); needs equal_counts.

    Raises:
        UserError: a sequence is empty or longer than the budget.
    """
    assert max_tokens > 0 and num_ranks > 0 and pad_to_multiple > 0 and microbatch_group_size > 0
    assert equal_counts or microbatch_group_size == 1, "groups of microbatches need equal counts"
    true_lengths = np.asarray(lengths, dtype=np.int64)
    padded = -(-true_lengths // pad_to_multiple) * pad_to_multiple
    _check_lengths(true_lengths, padded, max_tokens, pad_to_multiple)
    microbatches = plan_reference(
        padded.tolist(),
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        group=microbatch_group_size,
        equal_counts=equal_counts,
        a=costs.a,
        b=costs.b,
    )
    _assert_invariants(microbatches, padded, max_tokens, num_ranks, equal_counts, microbatch_group_size)
    per_sequence = costs.a * padded + costs.b * (padded * padded)
    rank_costs = [float(sum(per_sequence[m].sum() for m in rank if m)) for rank in microbatches]
    return PackingPlan(microbatches, rank_costs, int(padded.sum()))


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


def _assert_invariants(
    microbatches: list[list[list[int]]],
    padded: np.ndarray,
    max_tokens: int,
    num_ranks: int,
    equal_counts: bool,
    group: int,
) -> None:
    flat = [microbatch for rank in microbatches for microbatch in rank]
    seen = np.sort(np.array([i for microbatch in flat for i in microbatch], dtype=np.int64))
    assert np.array_equal(seen, np.arange(len(padded))), "every sequence exactly once"
    assert all(padded[m].sum() <= max_tokens for m in flat if m), "token budget"
    assert len(microbatches) == num_ranks
    counts = {len(rank) for rank in microbatches}
    assert not equal_counts or len(counts) == 1, f"equal counts, found {counts}"
    assert all(count % group == 0 for count in counts), f"groups of {group}, found {counts}"
    if len(padded) >= num_ranks:
        assert all(rank and rank[0] for rank in microbatches), "no idle rank"
