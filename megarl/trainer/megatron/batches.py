"""From the sequences of an optimizer step to one rank's microbatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.config.schema import PackingConfig
from megarl.losses.base import per_token
from megarl.packing.pack import pack
from megarl.packing.plan import CostModel, plan_groups
from megarl.packing.routing import pack_experts
from megarl.packing.shared_prefix import plan_units, share_prefixes
from megarl.packing.token_values import put
from megarl.records import PackedBatch, Sequence
from megarl.trainer.megatron.initialize import RankContext


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
    packed.
    """
    layout, at, device = context.layout, context.at, context.platform.device
    multiple = (2 * layout.context if layout.context > 1 else 1) * (
        layout.tensor if layout.sequence_parallel else 1
    )
    limits = {
        "max_tokens": packing.max_tokens_per_microbatch,
        "num_ranks": layout.data,
        "pad_to_multiple": multiple,
        "microbatch_group_size": layout.pipeline if layout.virtual > 1 else 1,
    }
    stale = (
        [np.array(s.stale, dtype=np.float64) for s in sequences] if any(s.stale for s in sequences) else None
    )
    chosen = list(range(len(sequences))) if only is None else only
    sequences = [sequences[i] for i in chosen]
    origins, prefix_of = chosen, None
    if group_size == 1 and packing.share_prefix == "auto":
        shared = share_prefixes(sequences, max_tokens=limits["max_tokens"], pad_to_multiple=multiple)
        sequences, prefix_of = shared.sequences, shared.prefix_of
        origins = [chosen[i] for i in shared.origins]
        plan = plan_units(shared, costs=costs, **limits)
    else:
        lengths = [len(s.token_ids) for s in sequences]
        plan = plan_groups(lengths, group_size=group_size, costs=costs, **limits)
    _assert_shared(context, plan.microbatches[at.data])
    num_tokens = sum(len(s.token_ids) for s in sequences)
    origin_of = torch.tensor(origins, device=device)
    batches = []
    for indices in plan.microbatches[at.data]:
        batch = pack(
            sequences,
            indices,
            pad_to_multiple=multiple,
            device=device,
            cp_rank=at.context,
            cp_size=layout.context,
            prefix_of=prefix_of,
        )
        batch.sequence_ids = origin_of[batch.sequence_ids]
        batch.experts = pack_experts(sequences, indices, batch, at.context, layout.context)
        batch.token_share = sum(len(sequences[i].token_ids) for i in indices) / num_tokens
        batch.loss_weights = per_token(batch, weights)
        batch.stale = None if stale is None else put(stale, batch)
        batches.append(batch)
    return batches, plan.num_tokens


def _assert_shared(context: RankContext, microbatches: list[list[int]]) -> None:
    """Sums over a sequence's tokens are taken over context-parallel ranks, slot by slot."""
    if context.layout.context == 1:
        return
    theirs: list[Any] = [None] * context.layout.context
    dist.all_gather_object(theirs, microbatches, group=parallel_state.get_context_parallel_group())
    assert all(other == microbatches for other in theirs), "context-parallel ranks hold other sequences"
