"""Passes shared by algorithms, over any :class:`megarl.trainer.interface.Trainer`.

Every rank calls every function, with its own microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from megarl.batching.token_trace import TokenTrace
from megarl.cluster.collectives import gather
from megarl.losses.base import Loss, LossResult
from megarl.losses.logprob_mismatch import LogprobMismatch
from megarl.losses.reward import last_scores
from megarl.losses.score_inputs import ScoreLoss
from megarl.records import PackedBatch, TrainBatch
from megarl.trainer.interface import Trainer
from megarl.trainer.outputs import Output, Sampler
from megarl.trainer.reduce import mismatch_of, reduce_mismatch, reduce_results

LogprobField = Literal["old_logprobs", "ref_logprobs"]


@dataclass(slots=True)
class TrainStepResult:
    """One optimizer step, reduced over all ranks."""

    metrics: dict[str, float] = field(default_factory=dict)
    mismatch: LogprobMismatch = field(default_factory=LogprobMismatch)


# --- a policy -------------------------------------------------------------------------------------


def fill_logprobs(
    trainer: Trainer,
    batches: list[PackedBatch],
    into: LogprobField,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    trace: TokenTrace | None = None,
) -> LogprobMismatch:
    """Forward only: set ``into`` of every microbatch to the current weights' logprobs (last stage).

    The logprobs are of the sampler's distribution, like the engine's. Returns their mismatch to the engine's,
    over all ranks. ``trace`` keeps those of its sequences.
    """
    mismatch, sampler = LogprobMismatch(), Sampler(temperature, top_k, top_p)

    def read(output: Output) -> None:
        nonlocal mismatch
        tokens = output.logprobs(sampler)
        setattr(output.batch, into, _at_rows(output.batch, tokens.rows, tokens.logprobs))
        if trace is not None:
            trace.read(output.batch, tokens)
        mismatch = mismatch + mismatch_of(tokens)

    trainer.run(batches, read)
    return reduce_mismatch(trainer.context, mismatch)


def train_step(
    trainer: Trainer,
    batches: list[PackedBatch],
    loss: Loss,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    trace: TokenTrace | None = None,
) -> TrainStepResult:
    """Take one optimizer step on a loss over logprobs and entropies of the sampler's distribution.

    A truncating sampler's support is computed with the current weights. ``trace`` keeps logprobs and
    entropies of its sequences.
    """
    mismatch, sampler = LogprobMismatch(), Sampler(temperature, top_k, top_p)

    def learn(output: Output) -> LossResult:
        nonlocal mismatch
        tokens = output.logprobs(sampler)
        mismatch = mismatch + mismatch_of(tokens)
        if trace is not None:
            trace.read(output.batch, tokens)
        return loss(tokens)

    metrics = trainer.optimizer_step(batches, learn)
    return TrainStepResult(metrics, reduce_mismatch(trainer.context, mismatch))


def evaluate_loss(trainer: Trainer, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
    """Forward only: return the loss's metrics over all ranks."""
    return reduce_results(trainer.run(batches, lambda output: loss(output.logprobs())))


def sequence_logprobs(trainer: Trainer, batch: TrainBatch) -> torch.Tensor:
    """Forward only: return the summed logprob of each sequence's targets, [S] float64 on every rank."""
    batches = trainer.prepare(batch, "token").batches

    def read(output: Output) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = output.logprobs()
        assert tokens.slot_ids is not None
        return tokens.slot_ids, tokens.sequence_sums(tokens.logprobs)

    return _per_sequence(trainer, batches, read, len(batch))


# --- a model with a score head ---------------------------------------------------------------------


def fill_values(trainer: Trainer, batches: list[PackedBatch]) -> None:
    """Forward only: set ``old_values`` of every microbatch to the critic's current values (last stage)."""

    def read(output: Output) -> None:
        tokens = output.scores("targets")
        output.batch.old_values = _at_rows(output.batch, tokens.rows, tokens.scores)

    trainer.run(batches, read)


def sequence_scores(trainer: Trainer, batch: TrainBatch) -> torch.Tensor:
    """Forward only: return each sequence's score, [S] float64 on every rank. Pairs share microbatches."""
    batches = trainer.prepare(batch, "token", group_size=2).batches

    def read(output: Output) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = output.scores("last")
        return tokens.slot_ids, last_scores(tokens)

    return _per_sequence(trainer, batches, read, len(batch))


def score_step(
    trainer: Trainer, batches: list[PackedBatch], loss: ScoreLoss, of: Literal["targets", "last"]
) -> dict[str, float]:
    """Take one optimizer step on a loss over scores; return its metrics over all ranks."""
    return trainer.optimizer_step(batches, lambda output: loss(output.scores(of)))


def evaluate_score_loss(
    trainer: Trainer, batches: list[PackedBatch], loss: ScoreLoss, of: Literal["targets", "last"]
) -> dict[str, float]:
    """Forward only: return the loss's metrics over all ranks."""
    return reduce_results(trainer.run(batches, lambda output: loss(output.scores(of))))


# --- helpers ----------------------------------------------------------------------------------------


def _at_rows(batch: PackedBatch, rows: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Return a field [T] float32 with ``values`` [N] at ``rows`` and 0 elsewhere."""
    assert rows is not None
    whole = torch.zeros(batch.token_ids.shape[0], device=values.device)
    whole[rows] = values
    return whole


def _per_sequence(
    trainer: Trainer,
    batches: list[PackedBatch],
    read: Callable[[Output], tuple[torch.Tensor, torch.Tensor]],
    count: int,
) -> torch.Tensor:
    """Return [count] float64 on every rank from ``read``'s (sequence ids, values) of a microbatch's slots."""
    mine: dict[int, float] = {}

    def keep(output: Output) -> None:
        ids, values = read(output)
        mine.update(zip(ids.tolist(), values.tolist(), strict=True))

    trainer.run(batches, keep)
    parts = gather(mine if trainer.context.has_results else {})
    found = {i: value for part in parts for i, value in part.items()}
    return torch.tensor([found[i] for i in range(count)], dtype=torch.float64)
