"""Packing without C++: the definitions that csrc/packing is tested against.

The planner comes first, pack_sequences_reference last. Both planners do the same steps in the same order on
the same doubles, so their plans are equal, not merely equally good. The steps, for n sequences, R ranks and a
budget of B tokens:

1. *Count.* Best-fit decreasing (each sequence, longest first, into the fullest bin with room) gives the
number of
   microbatches K that the budget needs; K is rounded up to the multiple that ranks and pipeline groups need.
2. *Fill.* Sequences, costliest first, each into the cheapest bin with room, to balance costs. If the budget
is too
   tight for that, the bins of step 1, the costliest ones split into spare bins.
3. *Assign.* Bins in order of decreasing cost, R at a time; in each row the costliest bin goes to the rank
with the
   least cost so far. The i-th microbatches of all ranks then cost about the same, which expert parallelism
   and pipelines wait for, and so do the ranks' sums, which all ranks wait for.
4. *Refine.* Exchange sequences (or whole bins) between the costliest rank and the cheapest ones while that
narrows
   the gap and keeps the budget; the same between bins if they are few.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass

import torch

from megarl.ops.pack import PackedFields, PackedRows, RaggedTokens

FILL_MAX_SEQUENCES = 65_536  # beyond this, best-fit bins: row dealing alone balances them, and it is faster
FILL_POPS_PER_SEQUENCE = 8  # how long the fill may look for room before the budget counts as too tight
REFINE_MAX_BINS = 512  # bins are refined one against another only in plans of a step's size
REFINE_WORK = 1 << 24  # steps times sequences, beyond REFINE_MIN_STEPS
REFINE_MIN_STEPS = 8
REFINE_TOLERANCE = 1e-3  # costs within 0.1 % of their mean are balanced
REFINE_PARTNERS = 4  # cheapest groups tried as partners of the costliest one
REFINE_NEIGHBOURS = 4  # sequences looked at on each side of the ideal exchange


@dataclass
class _Bins:
    """The state of a plan: ``members`` are indices into the list of lengths."""

    lengths: list[int]
    costs: list[float]
    max_tokens: int
    members: list[list[int]]
    loads: list[int]  # tokens per bin
    totals: list[float]  # cost per bin

    def add(self, bin_id: int, item: int) -> None:
        self.members[bin_id].append(item)
        self.loads[bin_id] += self.lengths[item]
        self.totals[bin_id] += self.costs[item]

    def remove(self, bin_id: int, item: int) -> None:
        self.members[bin_id].remove(item)
        self.loads[bin_id] -= self.lengths[item]
        self.totals[bin_id] -= self.costs[item]


@dataclass
class _Exchange:
    """The sequences moved from the costlier group to the cheaper one and back (-1: none)."""

    delta: float
    give_bin: int
    give_item: int  # -1: the whole bin
    take_bin: int
    take_item: int  # -1: nothing, or the whole bin


def plan_reference(
    lengths: list[int], *, max_tokens: int, num_ranks: int, group: int, equal_counts: bool, a: float, b: float
) -> list[list[list[int]]]:
    """Microbatches per rank, ``[rank][i] -> positions in lengths``, by the steps of the module's docstring.

    ``lengths`` are padded lengths in 1..max_tokens; ``group`` divides the count of every rank.
    """
    costs = [a * n + b * (n * n) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packed = _best_fit_decreasing(lengths, order, max_tokens)
    num_bins = count_bins(len(packed), len(lengths), num_ranks, group, equal_counts)
    bins = _fill(lengths, costs, order, max_tokens, num_bins) or _spread(
        lengths, costs, packed, max_tokens, num_bins
    )
    affordable = max(REFINE_MIN_STEPS, REFINE_WORK // max(len(lengths), 1))
    if num_bins <= REFINE_MAX_BINS:
        _refine(bins, [[i] for i in range(num_bins)], steps=min(2 * num_bins, affordable))
    ranks = _deal_rows(bins, num_ranks) if equal_counts else _deal_freely(bins, num_ranks)
    _refine(bins, ranks, steps=min(16 * num_ranks, affordable))
    return [[sorted(bins.members[i]) for i in _by_cost(bins, rank)] for rank in ranks]


def count_bins(needed: int, num_sequences: int, num_ranks: int, group: int, equal_counts: bool) -> int:
    """Microbatches over all ranks, given how many the budget alone needs."""
    if not equal_counts:
        return max(needed, min(num_sequences, num_ranks))
    per_rank = -(-needed // num_ranks)
    return num_ranks * group * -(-per_rank // group)


def _best_fit_decreasing(lengths: list[int], order: list[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_tokens + 1)]  # room left -> bins, newest last
    rooms = 0  # bit r is set where by_room[r] is not empty
    for item in order:
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            bin_id = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, bin_id = max_tokens, len(bins)
            bins.append([])
        bins[bin_id].append(item)
        by_room[room - length].append(bin_id)
        rooms |= 1 << (room - length)
    return bins


def _empty(lengths: list[int], costs: list[float], max_tokens: int, num_bins: int) -> _Bins:
    members: list[list[int]] = [[] for _ in range(num_bins)]
    return _Bins(lengths, costs, max_tokens, members, [0] * num_bins, [0.0] * num_bins)


def _fill(
    lengths: list[int], costs: list[float], order: list[int], max_tokens: int, num_bins: int
) -> _Bins | None:
    if len(lengths) > FILL_MAX_SEQUENCES:
        return None
    bins = _empty(lengths, costs, max_tokens, num_bins)
    heap = [(0.0, i) for i in range(num_bins)]
    pops = FILL_POPS_PER_SEQUENCE * len(lengths)
    for item in order:
        skipped = []
        while heap and bins.loads[heap[0][1]] + lengths[item] > max_tokens:
            skipped.append(heapq.heappop(heap))
            pops -= 1
        if not heap or pops < 0:
            return None
        bin_id = heap[0][1]
        bins.add(bin_id, item)
        heapq.heapreplace(heap, (bins.totals[bin_id], bin_id))
        for entry in skipped:
            heapq.heappush(heap, entry)
    return bins


def _spread(
    lengths: list[int], costs: list[float], packed: list[list[int]], max_tokens: int, num_bins: int
) -> _Bins:
    bins = _empty(lengths, costs, max_tokens, num_bins)
    for bin_id, items in enumerate(packed):
        for item in items:
            bins.add(bin_id, item)
    if num_bins == len(packed):
        return bins
    heap = [(-bins.totals[i], i) for i, items in enumerate(packed) if len(items) > 1]
    heapq.heapify(heap)
    for spare in range(len(packed), num_bins):
        if not heap:
            break
        bin_id = heapq.heappop(heap)[1]
        items = bins.members[bin_id]  # longest first, as packed put them
        bins.members[bin_id], bins.loads[bin_id], bins.totals[bin_id] = [], 0, 0.0
        for item in items:
            bins.add(spare if bins.totals[spare] < bins.totals[bin_id] else bin_id, item)
        for half in (bin_id, spare):
            if len(bins.members[half]) > 1:
                heapq.heappush(heap, (-bins.totals[half], half))
    return bins


def _by_cost(bins: _Bins, bin_ids: list[int]) -> list[int]:
    return sorted(
        bin_ids, key=lambda i: (-bins.totals[i], min(bins.members[i], default=len(bins.lengths)), i)
    )


def _deal_rows(bins: _Bins, num_ranks: int) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    order = _by_cost(bins, list(range(len(bins.members))))
    for row in range(0, len(order), num_ranks):
        cheapest_first = sorted(range(num_ranks), key=lambda r: (totals[r], r))
        for rank, bin_id in zip(cheapest_first, order[row : row + num_ranks], strict=True):
            ranks[rank].append(bin_id)
            totals[rank] += bins.totals[bin_id]
    return ranks


def _deal_freely(bins: _Bins, num_ranks: int) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, r) for r in range(num_ranks)]
    for bin_id in _by_cost(bins, list(range(len(bins.members)))):
        total, rank = heap[0]
        ranks[rank].append(bin_id)
        heapq.heapreplace(heap, (total + bins.totals[bin_id], rank))
    return ranks


def _refine(bins: _Bins, groups: list[list[int]], steps: int) -> None:
    """Exchange between the costliest group and the cheapest ones, in place, until no exchange helps."""
    if len(groups) < 2:
        return
    for _ in range(steps):
        totals = [_add_up([bins.totals[bin_id] for bin_id in group]) for group in groups]
        mean = _add_up(totals) / len(totals)
        cheapest_first = sorted(range(len(groups)), key=lambda g: (totals[g], g))
        high = max(range(len(groups)), key=lambda g: (totals[g], -g))
        if totals[high] <= mean * (1.0 + REFINE_TOLERANCE):
            return
        for low in cheapest_first[:REFINE_PARTNERS]:
            exchange = _best_exchange(bins, groups[high], groups[low], totals[high] - totals[low])
            if exchange is not None:
                _apply(bins, groups[high], groups[low], exchange)
                break
        else:
            return


def _best_exchange(bins: _Bins, high: list[int], low: list[int], gap: float) -> _Exchange | None:
    """The exchange that comes nearest to halving the gap; None where none narrows it by 0.1 %."""
    best: _Exchange | None = None
    error = gap / 2 * (1.0 - REFINE_TOLERANCE)

    def consider(delta: float, give_bin: int, give_item: int, take_bin: int, take_item: int) -> None:
        nonlocal best, error
        if abs(delta - gap / 2) < error:
            error = abs(delta - gap / 2)
            best = _Exchange(delta, give_bin, give_item, take_bin, take_item)

    whole = sorted((bins.totals[bin_id], -1, bin_id) for bin_id in low)
    for give in high:  # whole bins: the budget holds by itself
        for cost, _, take in _nearest(whole, bins.totals[give] - gap / 2):
            consider(bins.totals[give] - cost, give, -1, take, -1)
    single = sorted((bins.costs[i], i, bin_id) for bin_id in low for i in bins.members[bin_id])
    for give in high:
        for item in bins.members[give]:
            length, cost = bins.lengths[item], bins.costs[item]
            with_room = (take for take in low if bins.loads[take] + length <= bins.max_tokens)
            take = next(with_room, -1)
            if take >= 0 and len(bins.members[give]) > 1:
                consider(cost, give, item, take, -1)
            for other_cost, other, take in _nearest(single, cost - gap / 2):
                if bins.loads[take] - bins.lengths[other] + length <= bins.max_tokens:
                    consider(cost - other_cost, give, item, take, other)
    return best


def _nearest(offers: list[tuple[float, int, int]], ideal: float) -> list[tuple[float, int, int]]:
    middle = bisect_left(offers, ideal, key=lambda offer: offer[0])
    return offers[max(0, middle - REFINE_NEIGHBOURS) : middle + REFINE_NEIGHBOURS]


def _add_up(values: list[float]) -> float:
    """Plain left-to-right sum: from Python 3.12 on, sum() compensates rounding and C++ would differ."""
    total = 0.0
    for value in values:
        total += value
    return total


def _apply(bins: _Bins, high: list[int], low: list[int], exchange: _Exchange) -> None:
    give, take = exchange.give_bin, exchange.take_bin
    if exchange.give_item < 0:
        high[high.index(give)], low[low.index(take)] = take, give
        return
    bins.remove(give, exchange.give_item)
    if exchange.take_item >= 0:
        bins.remove(take, exchange.take_item)
        bins.add(give, exchange.take_item)
    bins.add(take, exchange.give_item)


def pack_sequences_reference(
    tokens: RaggedTokens, rows: PackedRows, *, num_tokens: int, cp_rank: int = 0, cp_size: int = 1
) -> PackedFields:
    """:func:`megarl.ops.pack.pack_sequences` in plain torch, vectorised over tokens."""
    widths = rows.cu_seqlens.long().diff()
    which = torch.arange(len(widths)).repeat_interleave(widths // cp_size)  # sequence of each position
    local = torch.arange(num_tokens) - (rows.cu_seqlens.long()[:-1] // cp_size)[which]
    if cp_size == 1:
        positions = local
    else:
        chunk = (widths // (2 * cp_size))[which]
        late = (2 * cp_size - 1 - cp_rank) * chunk + (local - chunk)
        positions = torch.where(local < chunk, cp_rank * chunk + local, late)
    lengths = rows.lengths.long()[which]
    source = rows.starts[which] + positions
    has_token = positions < lengths
    has_target = positions + 1 < lengths
    token_at = source[has_token]
    target_at = source[has_target] + 1
    token_ids = torch.zeros(num_tokens, dtype=torch.int64)
    token_ids[has_token] = tokens.token_ids[token_at]
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    labels[has_target] = tokens.token_ids[target_at]
    loss_mask = torch.zeros(num_tokens)
    loss_mask[has_target] = (tokens.loss_mask[target_at] != 0).float()
    advantages = torch.where(loss_mask > 0, rows.advantages[which], 0.0)
    logprobs = torch.zeros(0)
    if tokens.rollout_logprobs is not None:
        logprobs = torch.zeros(num_tokens)
        logprobs[has_target] = tokens.rollout_logprobs[target_at]
        logprobs = torch.where(loss_mask > 0, logprobs, 0.0)
    return PackedFields(token_ids, labels, loss_mask, positions, rows.rows[which], advantages, logprobs)
