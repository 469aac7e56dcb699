"""Shared prompts: a group's prompt computed once, [prompt | response 1 | response 2 ...].

A group's sequences become one *prefix*, the prompt without its last token, and *branches*, each of which
repeats that last token and continues with its response. A branch therefore predicts every token of its
response from its own positions, labels and per-token values stay aligned as in any packed sequence, and only
attention and positions need to know the prefix. Exact: a token attends to the same tokens at the same
positions as in the flat packing. Nothing is copied: prefixes and branches are segments of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megarl.batching.microbatch_plan import CostModel, PackingPlan, plan_microbatches
from megarl.batching.segments import Segments
from megarl.records import TrainBatch

MIN_SAVED_FRACTION = 0.1
"""Minimum saved share of a group's tokens: below it, the mask costs more than the tokens would."""


def share_prefixes(
    batch: TrainBatch, rows: np.ndarray, *, max_tokens: int, pad_to_multiple: int
) -> tuple[Segments, np.ndarray]:
    """Share the prompt of consecutive ``rows`` with equal prompts (``prompt_lengths``) if that saves enough.

    A group that does not fit ``max_tokens`` is divided, each part with its own prefix. Also returns bounds [U
    + 1] of the U units, the runs of segments that must share a microbatch.
    """
    lengths = batch.lengths.tolist()
    segments: list[tuple[int, int, int, int]] = []  # as Segments: row, skip, length, prefix
    bounds = [0]
    for group in _same_prompt_runs(batch, rows.tolist()):
        prompt = int(batch.prompt_lengths[group[0]])
        flat = sum(lengths[row] for row in group)
        parts = [group] if prompt <= 1 else _split_to_fit(lengths, group, prompt, max_tokens, pad_to_multiple)
        for part in parts:
            saved = (len(part) - 1) * (prompt - 1)
            if prompt > 1 and len(part) > 1 and saved >= MIN_SAVED_FRACTION * flat * len(part) / len(group):
                number, shared = len(segments), prompt - 1
                segments.append((part[0], 0, shared, -1))
                segments += [(row, shared, lengths[row] - shared, number) for row in part]
                bounds.append(len(segments))
                assert not any(_has_target(batch, row, prompt) for row in part), "a target in a prompt"
            else:
                segments += [(row, 0, lengths[row], -1) for row in part]
                bounds += range(bounds[-1] + 1, len(segments) + 1)
    columns = np.array(segments, dtype=np.int64).reshape(-1, 4).T
    return Segments(*map(np.ascontiguousarray, columns)), np.array(bounds)


def plan_units(
    segments: Segments,
    bounds: np.ndarray,
    *,
    max_tokens: int,
    num_ranks: int,
    pad_to_multiple: int,
    costs: CostModel,
    microbatch_group_size: int,
) -> PackingPlan:
    """See plan_microbatches, with equal counts; the segments of a unit share a microbatch."""
    padded = -(-segments.lengths // pad_to_multiple) * pad_to_multiple
    totals = np.add.reduceat(padded, bounds[:-1]) if len(padded) else padded
    plan = plan_microbatches(
        totals,
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        # Members of a unit attend to themselves and the prefix, not to each other.
        costs=CostModel(costs.a, costs.b * len(totals) / max(len(padded), 1)),
        microbatch_group_size=microbatch_group_size,
    )
    edges = bounds.tolist()
    members = [
        [[i for unit in microbatch for i in range(edges[unit], edges[unit + 1])] for microbatch in rank]
        for rank in plan.microbatches
    ]
    return PackingPlan(members, plan.rank_costs, plan.num_tokens)


def _same_prompt_runs(batch: TrainBatch, rows: list[int]) -> Iterator[list[int]]:
    """Yield runs of consecutive rows with the same prompt."""
    ids, starts, prompts = batch.token_ids, batch.offsets.tolist(), batch.prompt_lengths.tolist()
    group: list[int] = []
    first = np.zeros(0, dtype=np.int32)
    for row in rows:
        size = prompts[row]
        prompt = ids[starts[row] : starts[row] + size]
        if group and (size != len(first) or not np.array_equal(prompt, first)):
            yield group
            group = []
        if not group:
            first = prompt
        group.append(row)
    if group:
        yield group


def _split_to_fit(
    lengths: list[int], group: list[int], prompt: int, max_tokens: int, multiple: int
) -> list[list[int]]:
    """Divide the group into parts that fit a microbatch with one prefix each."""

    def padded(length: int) -> int:
        return -(-length // multiple) * multiple

    parts: list[list[int]] = []
    used = max_tokens + 1
    for row in group:
        branch = padded(lengths[row] - prompt + 1)
        if used + branch > max_tokens:
            parts.append([])
            used = padded(prompt - 1)
        parts[-1].append(row)
        used += branch
    return parts


def _has_target(batch: TrainBatch, row: int, prompt: int) -> bool:
    start = int(batch.offsets[row])
    return bool(batch.loss_mask[start + 1 : start + prompt].any())
