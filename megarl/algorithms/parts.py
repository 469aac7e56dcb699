"""The optimizer steps of an online step: rank 0's samples, every rank's microbatches, passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from megarl.algorithms.rollouts import split_groups
from megarl.algorithms.run import Run
from megarl.config.online import OnlineAlgorithm, OnlineConfig
from megarl.losses.agreement import Agreement
from megarl.losses.base import Aggregation, Loss
from megarl.packing.samples import train_batch
from megarl.records import Group, PackedBatch, Sample, TrainBatch
from megarl.trainer.batches import PackedStep, gather_from_packed, scatter_to_packed
from megarl.trainer.control import from_first_rank
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import TrainStepResult, fill_logprobs, train_step

Field = Literal["advantages", "returns", "nll_weights"]
Item = TypeVar("Item")


@dataclass(slots=True)
class Part:
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
        """What pack_parts made of it."""
        assert self._packed is not None, "pack_parts comes first"
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


def make_parts(
    groups: list[Group],
    number: int,
    version: int | None = None,
    *,
    leave_out: Callable[[Sample], bool] = lambda _: False,
    then: Callable[[list[Part]], dict[str, Any]] = lambda _: {},
) -> tuple[list[Part], dict[str, Any]]:
    """Whole groups, in order, to at most ``number`` parts, as equal as can be; and what ``then`` returns.

    Every rank calls it and gets as many; ``groups`` are rank 0's, which alone calls the functions.

    Args:
        groups: graded.
        number: how many optimizer steps; fewer where there are fewer groups.
        version: the trainer's, where tokens of older ones are to be marked.
        leave_out: samples that are not trained on.
        then: what else rank 0 does with the parts; small figures that go to every rank.

    Raises:
        UserError: on every rank, where a function did.
    """
    parts: list[Part] = []

    def make() -> tuple[int, dict[str, Any]]:
        first = 0
        for samples in split_groups(groups, number):
            kept = [i for i, sample in enumerate(samples) if not leave_out(sample)]
            if kept:
                chosen = [samples[i] for i in kept]
                batch = train_batch(chosen, version)
                parts.append(Part(chosen, np.array(kept) + first, batch, batch.num_targets()))
            first += len(samples)
        return len(parts), then(parts)

    count, values = from_first_rank(make)
    return parts or [Part() for _ in range(count)], values


def pack_parts(
    trainer: Trainer, parts: list[Part], aggregation: Aggregation, fixed_length: int | None = None
) -> dict[str, float]:
    """Every rank's microbatches of every part; how many there are, and of how many tokens."""
    for part in parts:
        part.packed = trainer.prepare(
            part.batch,
            aggregation,
            fixed_length=fixed_length,
            only=part.only,
            advantages=part.advantages,
            scatter=True,
        )
    packed = [part.packed for part in parts]
    return {
        "num_microbatches": sum(len(each.batches) for each in packed),
        "num_tokens": sum(each.num_tokens for each in packed),
        "num_computed_tokens": sum(each.num_computed_tokens for each in packed),
    }


def placed(parts: list[Part]) -> dict[str, float]:
    """How many sequences were split over context-parallel ranks, and how many were not: means over parts."""
    found = [part.packed.placed for part in parts]
    return {name: sum(each[name] for each in found) / len(found) for name in (found[0] if found else ())}


def old_and_reference(
    policy: Trainer, parts: list[Part], config: OnlineConfig, run: Run, old: bool | Literal["rollout"]
) -> Agreement:
    """Fill the old and reference logprobs that are needed; how the old ones agree with the engine's.

    ``old`` "rollout" takes the engine's for them, without a pass.
    """
    temperature, agreement = config.rollout.temperature, Agreement()
    with run.timers("logprobs"):
        for part in parts if old is True else ():
            filled = fill_logprobs(policy, part.batches, "old_logprobs", temperature=temperature)
            agreement = agreement + filled
        for batch in (each for part in parts for each in part.batches) if old == "rollout" else ():
            batch.old_logprobs = batch.rollout_logprobs
        if config.algorithm.needs_reference:
            with policy.reference():
                for part in parts:
                    fill_logprobs(policy, part.batches, "ref_logprobs", temperature=temperature)
    return agreement


def policy_step(policy: Trainer, part: Part, loss: Loss, config: OnlineConfig) -> TrainStepResult:
    """One optimizer step on the distribution that the engine draws from."""
    rollout = config.rollout
    temperature, top_k, top_p = rollout.temperature, rollout.top_k, rollout.top_p
    return train_step(policy, part.batches, loss, temperature=temperature, top_k=top_k, top_p=top_p)


def passes(run: Run, items: list[Item], num_epochs: int) -> Iterator[Item]:
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


def train_speed(run: Run, values: dict[str, float], algorithm: OnlineAlgorithm) -> dict[str, float]:
    """Tokens trained on per second of the train phase, all passes over ``num_tokens`` counted."""
    tokens = values["num_tokens"] * algorithm.num_epochs_per_batch
    return {"tokens_per_second_train": tokens / run.timers.seconds("train")}


def kl_to_reference(batch: PackedBatch) -> torch.Tensor:
    """k1 = old - reference logprob of every target [T]."""
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return batch.old_logprobs - batch.ref_logprobs


def scatter_parts(parts: list[Part], into: Field, values: list[np.ndarray]) -> None:
    """Set a field of every microbatch from rank 0's values of each part, [S] or [T]."""
    for part, own in zip(parts, values, strict=True):
        for batch, tokens in zip(part.batches, scatter_to_packed(part.packed, own), strict=True):
            setattr(batch, into, tokens)


def token_offsets(parts: list[Part]) -> np.ndarray:
    """[S + 1] int64: where each sequence's tokens begin, those of all parts end to end (rank 0)."""
    lengths = [np.zeros(1, dtype=np.int64), *(part.batch.lengths for part in parts)]
    return np.concatenate(lengths).cumsum()


def set_advantages(parts: list[Part], advantages: np.ndarray) -> None:
    """Advantages [S] or [T] of all parts' sequences or tokens to the parts, and their means to the samples.

    A sample without a target in the loss keeps what it has.
    """
    per_token = len(advantages) == sum(part.batch.num_tokens for part in parts)  # more than sequences
    start = 0
    for part in parts:
        end = start + (part.batch.num_tokens if per_token else len(part.samples))
        part.advantages, start = advantages[start:end], end
        targets = part.targets()
        for row, (sample, count) in enumerate(zip(part.samples, part.num_targets.tolist(), strict=True)):
            if count and per_token:
                span = slice(*part.batch.offsets[row : row + 2].tolist())
                own = part.advantages[span][targets[span]]
                sample.advantage = float(own[0] if (own == own[0]).all() else own.mean())
            elif count:
                sample.advantage = float(part.advantages[row])


def gather_parts(parts: list[Part], of: Callable[[PackedBatch], Any]) -> np.ndarray:
    """What ``of`` says of each target: all parts' tokens end to end, float64, on rank 0; elsewhere empty."""
    found = [gather_from_packed(part.packed, of) for part in parts]
    return np.concatenate([np.zeros(0), *found])
