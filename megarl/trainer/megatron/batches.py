"""From the sequences of an optimizer step to one rank's microbatches."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from megarl.config.packing import PackingConfig
from megarl.losses.base import per_token
from megarl.packing.pack import pack
from megarl.packing.placement import Limits, Part, place
from megarl.packing.plan import CostModel
from megarl.packing.routing import pack_experts
from megarl.packing.token_values import put
from megarl.records import PackedBatch, Sequence
from megarl.trainer.control import gather
from megarl.trainer.interface import RankContext


def make_batches(
    context: RankContext,
    packing: PackingConfig,
    costs: CostModel,
    sequences: list[Sequence],
    weights: list[float],
    group_size: int,
    only: list[int] | None = None,
) -> tuple[list[PackedBatch], int]:
    """Plan over all ranks, pack this rank's microbatches; also the tokens that all ranks compute.

    ``weights`` [S] are those of a sequence's targets in the loss (token_weights).
    ``sequence_ids`` of the batches count the caller's sequences. Prompts are shared unless ``group_size``
    neighbours must be packed whole (pairs) or packing.share_prefix is off. With ``only`` the others are not
    packed. Which of them context-parallel ranks share is place()'s to say.
    """
    layout, at, device = context.layout, context.at, context.platform.device
    stale = (
        [np.array(s.stale, dtype=np.float64) for s in sequences] if any(s.stale for s in sequences) else None
    )
    limits = Limits(
        max_tokens=packing.max_tokens_per_microbatch,
        group_size=group_size,
        share_prefixes=packing.share_prefix == "auto",
        split_from=context.parallel.context_split_from,
    )
    numbers = list(range(len(sequences))) if only is None else only
    parts = place(sequences, numbers, limits, costs, layout, at)
    _assert_shared(context, parts)
    num_tokens = sum(len(s.token_ids) for part in parts for s in part.sequences)
    batches = []
    for part in parts:
        origin_of = torch.tensor(part.origins, device=device)
        for indices in part.microbatches:
            batch = pack(
                part.sequences,
                indices,
                pad_to_multiple=part.pad_to_multiple,
                device=device,
                cp_rank=part.cp_rank,
                cp_size=part.cp_size,
                prefix_of=part.prefix_of,
            )
            batch.split = part.split
            batch.sequence_ids = origin_of[batch.sequence_ids]
            batch.experts = pack_experts(part.sequences, indices, batch, part.cp_rank, part.cp_size)
            batch.token_share = sum(len(part.sequences[i].token_ids) for i in indices) / num_tokens
            batch.loss_weights = per_token(batch, weights)
            batch.stale = None if stale is None else put(stale, batch)
            batches.append(batch)
    return batches, sum(part.plan.num_tokens for part in parts)


def count_placed(context: RankContext, batches: list[PackedBatch], *, counts: bool) -> dict[str, float]:
    """How many sequences of a step are split over context-parallel ranks, and how many are computed whole.

    Every rank calls it; ranks that hold copies of others' microbatches say so with ``counts`` False. Empty
    without parallel.context_split_from.
    """
    if context.parallel.context_split_from is None:
        return {}
    found = {True: 0, False: 0}
    for batch in batches if counts else []:
        if not batch.is_dummy and not (batch.split and context.at.context > 0):
            found[batch.split] += len(batch.sequence_ids.unique())
    ranks = gather(found)
    return {
        "num_split_sequences": float(sum(rank[True] for rank in ranks)),
        "num_whole_sequences": float(sum(rank[False] for rank in ranks)),
    }


def _assert_shared(context: RankContext, parts: list[Part]) -> None:
    """Sums over a split sequence's tokens are taken over context-parallel ranks, slot by slot."""
    if context.layout.context == 1:
        return
    mine = [(part.split, part.microbatches if part.split else len(part.microbatches)) for part in parts]
    others = replace(context.at, context=0, expert=0, expert_tensor=0, expert_data=0)  # equal in its group
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    theirs = {found for group, found in gather((others, digest)) if group == others}
    assert theirs == {digest}, "context-parallel ranks hold other sequences"
