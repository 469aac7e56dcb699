"""From the last hidden states to what a loss sees: logprob and entropy of the labels that have a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megarl.layout import ParallelLayout
from megarl.losses.base import LossResult, LossTokens
from megarl.models.spec import ModelSpec
from megarl.ops import TokenLogprobs, linear_support_min_logit, linear_token_logprob
from megarl.records import PackedBatch
from megarl.trainer.megatron.initialize import RankContext


@dataclass(frozen=True, slots=True)
class Sampler:
    """What tokens were drawn with; logprobs are of the same distribution. top_k 0 and top_p 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class HeadShard:
    """This tensor rank's rows of the head, padding cut off: [V_local, H], the first of id ``vocab_start``."""

    weight: torch.Tensor
    vocab_start: int
    layout: ParallelLayout

    @classmethod
    def of(cls, last_chunk: Any, spec: ModelSpec, context: RankContext) -> HeadShard:
        """The rows that the last stage's chunk of this rank holds."""
        layout = context.layout
        start = context.at.tensor * (spec.padded_vocab(layout.tensor) // layout.tensor)
        return cls(last_chunk.head_weight(), start, layout)


@dataclass(frozen=True, slots=True)
class OnHidden:
    """A use of a microbatch that wants hidden states [T, H] and the head instead of logprobs."""

    call: Callable[[PackedBatch, torch.Tensor, torch.Tensor, HeadShard], LossResult]


def rows_of(hidden: torch.Tensor, rows: torch.Tensor, layout: ParallelLayout) -> torch.Tensor:
    """hidden[rows] [N, H] for an op on this tensor rank's rows of the head.

    hidden [T, H], with sequence parallelism this rank's share of it. Gradients of the result, of this rank's
    part of the vocabulary alone, are summed over tensor ranks.
    """
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        return hidden.index_select(0, rows)
    return copy_to_tensor_model_parallel_region(hidden.index_select(0, rows))


def label_logprobs(
    hidden: torch.Tensor,
    head: HeadShard,
    labels: torch.Tensor,
    rows: torch.Tensor,
    sampler: Sampler,
    *,
    check_numerics: bool,
) -> TokenLogprobs:
    """Logprob and entropy [N] of ``labels[rows]`` under the sampler, float32.

    hidden [T, H] (with sequence parallelism this rank's share of it), labels [T], rows [N]. A sampler
    that truncates takes another pass over the logits, for its support; that gets no gradient.
    """
    hidden = rows_of(hidden, rows, head.layout)
    group = parallel_state.get_tensor_model_parallel_group() if head.layout.tensor > 1 else None
    support = None
    if sampler.truncates:
        support = linear_support_min_logit(
            hidden,
            head.weight,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            tp_group=group,
        )
    return linear_token_logprob(
        hidden,
        head.weight,
        labels[rows],
        temperature=sampler.temperature,
        vocab_start=head.vocab_start,
        tp_group=group,
        min_logit=support,
        check_numerics=check_numerics,
    )


def sharing_group(batch: PackedBatch, layout: ParallelLayout) -> dist.ProcessGroup | None:
    """The ranks that have parts of this microbatch's sequences; None where this rank has them whole."""
    return parallel_state.get_context_parallel_group() if batch.split and layout.context > 1 else None


def loss_tokens(
    batch: PackedBatch, rows: torch.Tensor, out: TokenLogprobs, layout: ParallelLayout
) -> LossTokens:
    """The loss's view of the ``rows`` [N] of a microbatch."""
    assert batch.loss_weights is not None
    # Of all tokens, not of those with a loss: then context-parallel ranks agree on the slots. A shared
    # prefix, which has no targets, counts to the slot of its first branch.
    ids, slots = torch.unique_consecutive(batch.sequence_ids, return_inverse=True)

    def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows]

    return LossTokens(
        logprobs=out.logprob,
        entropy=out.entropy,
        weights=batch.loss_weights[rows],
        labels=batch.labels[rows],
        sequence_ids=batch.sequence_ids[rows],
        advantages=of_rows(batch.advantages),
        old_logprobs=of_rows(batch.old_logprobs),
        ref_logprobs=of_rows(batch.ref_logprobs),
        rollout_logprobs=of_rows(batch.rollout_logprobs),
        stale=of_rows(batch.stale),
        nll_weights=of_rows(batch.nll_weights),
        slots=slots[rows],
        num_slots=len(ids),
        slot_ids=torch.full_like(ids, -1) if batch.is_dummy else ids,
        cp_group=sharing_group(batch, layout),
    )
