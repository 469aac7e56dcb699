"""Select the rows of the last stage's hidden states that a loss reads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megarl.layout import ParallelLayout
from megarl.losses.hidden import Head
from megarl.models.spec import ModelSpec
from megarl.records import PackedBatch
from megarl.trainer.interface import RankContext
from megarl.trainer.megatron.model import PolicyModel


def head_of(last_chunk: PolicyModel, spec: ModelSpec, context: RankContext) -> Head:
    """Return this rank's rows of the head, from the last stage's chunk."""
    size = context.layout.tensor
    start = context.at.tensor * (spec.padded_vocab(size) // size)
    group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
    return Head(last_chunk.head_weight(), start, group)


def rows_for_head(hidden: torch.Tensor, rows: torch.Tensor, layout: ParallelLayout) -> torch.Tensor:
    """Return hidden[rows] [N, H] for an op on this tensor rank's rows of the head.

    hidden [T, H]; with sequence parallelism, this rank's share of it. Gradients of the result, each from one
    rank's part of the vocabulary, are summed over tensor ranks.
    """
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return hidden.index_select(0, rows)
    return copy_to_tensor_model_parallel_region(hidden.index_select(0, rows))


def whole_rows(hidden: torch.Tensor, rows: torch.Tensor, layout: ParallelLayout) -> torch.Tensor:
    """Return hidden[rows] [N, H] for computations equal on every tensor rank; the gradient is not summed."""
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.index_select(0, rows)


def sharing_group(batch: PackedBatch, layout: ParallelLayout) -> dist.ProcessGroup | None:
    """Return the ranks that share this microbatch's sequences; None if this rank has them whole."""
    return parallel_state.get_context_parallel_group() if batch.split and layout.context > 1 else None
