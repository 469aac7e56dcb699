"""The optimizer steps of an online step: rank 0's samples, every rank's microbatches, passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from megarl.batching.rank_microbatches import PackedStep, gather_from_packed, scatter_to_packed
from megarl.batching.train_batch import train_batch
from megarl.cluster.collectives import from_first_rank
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.losses.base import Aggregation, Loss
from megarl.losses.logprob_mismatch import LogprobMismatch
from megarl.records import Group, PackedBatch, Sample, TrainBatch
from megarl.runs.training_run import TrainingRun
from megarl.sampling.rollout_manager import split_groups
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import TrainStepResult, fill_logprobs, train_step

Field = Literal["advantages", "returns", "nll_weights"]
Item = TypeVar("Item")


@dataclass(slots=True)
class MiniBatch:
    """One optimizer step. All but what is packed is rank 0's; other ranks have an empty batch."""

    samples: list[Sample] = field(default_factory=list)
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[S]: which of the step's samples they are, groups end to end."""
    batch: TrainBatch = field(default_factory=lambda: TrainBatch.of([]))  # sequence s is sample s
    num_targets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[S]: how many tokens of a sequence are in the loss; 0 of one that was taken out."""
    advantages: np.ndarray | None = None  # [S] float64, or [T] where tokens differ
    only: np.ndarray | None = None  # [.] ascending: the sequences that are packed, where not all are
    _packed: PackedStep | None = None

    @property
    def packed(self) -> PackedStep:
        """What :func:`pack` made of it."""
        assert self._packed is not None, "pack() comes first"
        return self._packed

    @packed.setter
    def packed(self, packed: PackedStep) -> None:
        self._packed = packed

    @property
    def known_advantages(self) -> np.ndarray:
        """The advantages, on rank 0; empty elsewhere."""
        return np.zeros(0) if self.advantages is None else self.advantages

    @property
    def batches(self) -> list[PackedBatch]:
        """This rank's microbatches."""
        return self.packed.batches

    def targets(self) -> np.ndarray:
        """[T] bool: the tokens that are in the loss."""
        return self.batch.targets() & np.repeat(self.num_targets > 0, self.batch.lengths)


def make(
    groups: list[Group],
    number: int,
    version: int | None = None,
    *,
    leave_out: Callable[[Sample], bool] = lambda _: False,
    then: Callable[[list[MiniBatch]], dict[str, Any]] = lambda _: {},
) -> tuple[list[MiniBatch], dict[str, Any]]:
    """Split the groups, whole and in order, into at most ``number`` mini-batches of about equal size.

    Every rank calls it and gets as many, and the dict that ``then`` returned; ``groups`` are rank 0's, which
    alone calls the functions.

    Args:
        groups: graded.
        number: how many optimizer steps; fewer where there are fewer groups.
        version: the trainer's, where tokens of older ones are to be marked.
        leave_out: samples that are not trained on.
        then: what else rank 0 does with the mini-batches; small figures that go to every rank.

    Raises:
        UserError: on every rank, where a function did.
    """
    minis: list[MiniBatch] = []

    def make() -> tuple[int, dict[str, Any]]:
        first = 0
        for samples in split_groups(groups, number):
            kept = [i for i, sample in enumerate(samples) if not leave_out(sample)]
            if kept:
                chosen = [samples[i] for i in kept]
                batch = train_batch(chosen, version)
                minis.append(MiniBatch(chosen, np.array(kept) + first, batch, batch.num_targets()))
            first += len(samples)
        return len(minis), then(minis)

    count, values = from_first_rank(make)
    return minis or [MiniBatch() for _ in range(count)], values


def pack(
    trainer: Trainer, minis: list[MiniBatch], aggregation: Aggregation, fixed_length: int | None = None
) -> dict[str, float]:
    """Every rank's microbatches of every mini-batch; how many there are, and of how many tokens."""
    for mini in minis:
        mini.packed = trainer.prepare(
            mini.batch,
            aggregation,
            fixed_length=fixed_length,
            only=mini.only,
            advantages=mini.advantages,
            scatter=True,
        )
    packed = [mini.packed for mini in minis]
    return {
        "num_microbatches": sum(len(each.batches) for each in packed),
        "num_tokens": sum(each.num_tokens for each in packed),
        "num_computed_tokens": sum(each.num_computed_tokens for each in packed),
    }


def split_metrics(minis: list[MiniBatch]) -> dict[str, float]:
    """Sequences split over context-parallel ranks and sequences kept whole, means over mini-batches."""
    found = [mini.packed.placed for mini in minis]
    return {name: sum(each[name] for each in found) / len(found) for name in (found[0] if found else ())}


def old_and_reference(
    policy: Trainer,
    minis: list[MiniBatch],
    config: OnlineConfig,
    run: TrainingRun,
    old: bool | Literal["rollout"],
) -> LogprobMismatch:
    """Fill the old and reference logprobs that are needed; how the old ones agree with the engine's.

    ``old`` "rollout" takes the engine's for them, without a pass.
    """
    temperature, mismatch = config.rollout.temperature, LogprobMismatch()
    with run.timers("logprobs"):
        for mini in minis if old is True else ():
            filled = fill_logprobs(policy, mini.batches, "old_logprobs", temperature=temperature)
            mismatch = mismatch + filled
        for batch in (each for mini in minis for each in mini.batches) if old == "rollout" else ():
            batch.old_logprobs = batch.rollout_logprobs
        if config.algorithm.needs_reference:
            with policy.reference():
                for mini in minis:
                    fill_logprobs(policy, mini.batches, "ref_logprobs", temperature=temperature)
    return mismatch


def policy_step(policy: Trainer, mini: MiniBatch, loss: Loss, config: OnlineConfig) -> TrainStepResult:
    """One optimizer step on the distribution that the engine draws from."""
    rollout = config.rollout
    temperature, top_k, top_p = rollout.temperature, rollout.top_k, rollout.top_p
    return train_step(policy, mini.batches, loss, temperature=temperature, top_k=top_k, top_p=top_p)


def epochs(run: TrainingRun, items: list[Item], num_epochs: int) -> Iterator[Item]:
    """What the optimizer steps of a batch are taken on, in order, under the clock and the progress bar."""
    total = num_epochs * len(items)
    with run.timers("train"), run.console.progress("train", total=total) as advance:
        for item in items * num_epochs:
            yield item
            advance(1)


def mean_metrics(results: list[dict[str, float]]) -> dict[str, float]:
    """Means over optimizer steps, and the last learning rate; nothing of none."""
    if not results:
        return {}
    means = {name: sum(each[name] for each in results) / len(results) for name in results[0]}
    return means | {"lr": results[-1]["lr"]}


def train_speed(run: TrainingRun, values: dict[str, float], algorithm: OnlineAlgorithm) -> dict[str, float]:
    """Tokens trained on per second of the train phase, all passes over ``num_tokens`` counted."""
    tokens = values["num_tokens"] * algorithm.num_epochs_per_batch
    return {"tokens_per_second_train": tokens / run.timers.seconds("train")}


def kl_to_reference(batch: PackedBatch) -> torch.Tensor:
    """k1 = old - reference logprob of every target [T]."""
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return batch.old_logprobs - batch.ref_logprobs


def scatter(minis: list[MiniBatch], into: Field, values: list[np.ndarray]) -> None:
    """Set a field of every microbatch from rank 0's values of each mini-batch, [S] or [T]."""
    for mini, own in zip(minis, values, strict=True):
        for batch, tokens in zip(mini.batches, scatter_to_packed(mini.packed, own), strict=True):
            setattr(batch, into, tokens)


def token_offsets(minis: list[MiniBatch]) -> np.ndarray:
    """[S + 1] int64: where each sequence's tokens begin, mini-batches end to end (rank 0)."""
    lengths = [np.zeros(1, dtype=np.int64), *(mini.batch.lengths for mini in minis)]
    return np.concatenate(lengths).cumsum()


def set_advantages(minis: list[MiniBatch], advantages: np.ndarray) -> None:
    """Set advantages [S] or [T], end to end, on the mini-batches, and their means on the samples.

    A sample without a target in the loss keeps what it has.
    """
    per_token = len(advantages) == sum(mini.batch.num_tokens for mini in minis)  # more than sequences
    start = 0
    for mini in minis:
        end = start + (mini.batch.num_tokens if per_token else len(mini.samples))
        mini.advantages, start = advantages[start:end], end
        targets = mini.targets()
        for row, (sample, count) in enumerate(zip(mini.samples, mini.num_targets.tolist(), strict=True)):
            if count and per_token:
                span = slice(*mini.batch.offsets[row : row + 2].tolist())
                own = mini.advantages[span][targets[span]]
                sample.advantage = float(own[0] if (own == own[0]).all() else own.mean())
            elif count:
                sample.advantage = float(mini.advantages[row])


def gather(minis: list[MiniBatch], of: Callable[[PackedBatch], Any]) -> np.ndarray:
    """What ``of`` says of each target, mini-batches end to end: float64 on rank 0, empty elsewhere."""
    found = [gather_from_packed(mini.packed, of) for mini in minis]
    return np.concatenate([np.zeros(0), *found])
