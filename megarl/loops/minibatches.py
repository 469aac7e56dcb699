"""Mini-batches of an online step: split the groups, pack microbatches, iterate over epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from megarl.batching.rank_microbatches import PackedStep, gather_from_packed, scatter_to_packed
from megarl.batching.token_trace import TokenTrace, TracedTokens
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
    """One optimizer step. All but the packed microbatches is on rank 0; other ranks have an empty batch."""

    samples: list[Sample] = field(default_factory=list)
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[S] indices of the samples within the step, groups end to end."""
    batch: TrainBatch = field(default_factory=lambda: TrainBatch.of([]))  # sequence s is sample s
    num_targets: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[S] tokens of each sequence in the loss; 0 for a sequence that was filtered out."""
    advantages: np.ndarray | None = None  # [S] float64, or [T] if they differ between tokens
    only: np.ndarray | None = None  # [.] ascending: the packed sequences; None: all
    trace: TokenTrace | None = None  # of the samples that the run writes down
    _packed: PackedStep | None = None

    @property
    def packed(self) -> PackedStep:
        """The result of :func:`pack`."""
        assert self._packed is not None, "pack() comes first"
        return self._packed

    @packed.setter
    def packed(self, packed: PackedStep) -> None:
        self._packed = packed

    def close_trace(self) -> None:
        """Trace no further pass: the weights are about to change, or have."""
        if self.trace is not None:
            self.trace.close()

    @property
    def known_advantages(self) -> np.ndarray:
        """The advantages on rank 0; empty elsewhere."""
        return np.zeros(0) if self.advantages is None else self.advantages

    @property
    def batches(self) -> list[PackedBatch]:
        """This rank's microbatches."""
        return self.packed.batches

    def targets(self) -> np.ndarray:
        """Return [T] bool: the tokens in the loss."""
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

    Every rank calls it and gets the same number of mini-batches and the dict that ``then`` returned. Only
    rank 0 has ``groups`` and calls the functions.

    Args:
        groups: graded.
        number: number of optimizer steps; fewer if there are fewer groups.
        version: the trainer's policy version, if tokens of older ones are to be marked.
        leave_out: returns True for samples to filter out.
        then: rank 0's further work on the mini-batches; its metrics are sent to every rank.

    Raises:
        UserError: on every rank, if a function raised it.
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
    """Pack every mini-batch into every rank's microbatches; return counts of microbatches and tokens."""
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


def trace_first(minis: list[MiniBatch], count: int, old: bool | Literal["rollout"] = False) -> None:
    """Trace the tokens of the first ``count`` samples of the step; comes before the first pass.

    Only the weights that drew the samples are of interest: without a pass for ``old`` logprobs the first
    mini-batch alone is traced, for the others are computed after its optimizer step.
    """
    if not count:
        return
    numbers = from_first_rank(lambda: [np.flatnonzero(mini.numbers < count) for mini in minis])
    for mini, rows in zip(minis if old is True else minis[:1], numbers, strict=False):
        mini.trace = TokenTrace(rows)


def traced(policy: Trainer, minis: list[MiniBatch]) -> dict[int, TracedTokens]:
    """Return sample number within the step -> its traced tokens, on rank 0; empty elsewhere."""
    found: dict[int, TracedTokens] = {}
    for mini in minis:
        if mini.trace is not None:
            has_results = policy.context.has_results
            tokens = mini.trace.gather(mini.batch, mini.advantages, has_results=has_results)
            found |= {int(mini.numbers[row]): values for row, values in tokens.items()}
    return found


def split_metrics(minis: list[MiniBatch]) -> dict[str, float]:
    """Return mean numbers of sequences split over context-parallel ranks and kept whole per mini-batch."""
    found = [mini.packed.split_counts for mini in minis]
    return {name: sum(each[name] for each in found) / len(found) for name in (found[0] if found else ())}


def old_and_reference(
    policy: Trainer,
    minis: list[MiniBatch],
    config: OnlineConfig,
    run: TrainingRun,
    old: bool | Literal["rollout"],
) -> LogprobMismatch:
    """Compute the old and reference logprobs that are needed; return the old ones' mismatch to the engine's.

    ``old`` "rollout" uses the engine's logprobs as old ones, without a forward pass.
    """
    rollout, mismatch = config.rollout, LogprobMismatch()
    temperature, top_k, top_p = rollout.temperature, rollout.top_k, rollout.top_p
    with run.timers("logprobs"):
        for mini in minis if old is True else ():
            mismatch = mismatch + fill_logprobs(
                policy,
                mini.batches,
                "old_logprobs",
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                trace=mini.trace,
            )
            mini.close_trace()
        for batch in (each for mini in minis for each in mini.batches) if old == "rollout" else ():
            batch.old_logprobs = batch.rollout_logprobs
        if config.algorithm.needs_reference:
            with policy.reference():
                for mini in minis:
                    fill_logprobs(policy, mini.batches, "ref_logprobs", temperature=temperature)
    return mismatch


def policy_step(policy: Trainer, mini: MiniBatch, loss: Loss, config: OnlineConfig) -> TrainStepResult:
    """Take one optimizer step, on the distribution the engine samples from."""
    rollout = config.rollout
    temperature, top_k, top_p = rollout.temperature, rollout.top_k, rollout.top_p
    result = train_step(
        policy,
        mini.batches,
        loss,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        trace=mini.trace,
    )
    mini.close_trace()
    return result


def epochs(run: TrainingRun, items: list[Item], num_epochs: int) -> Iterator[Item]:
    """Yield the items of all epochs in order, timed and with a progress bar."""
    total = num_epochs * len(items)
    with run.timers("train"), run.console.progress("train", total=total) as advance:
        for item in items * num_epochs:
            yield item
            advance(1)


def mean_metrics(results: list[dict[str, float]]) -> dict[str, float]:
    """Return means over optimizer steps and the last learning rate; empty without results."""
    if not results:
        return {}
    means = {name: sum(each[name] for each in results) / len(results) for name in results[0]}
    return means | {"lr": results[-1]["lr"]}


def train_speed(run: TrainingRun, values: dict[str, float], algorithm: OnlineAlgorithm) -> dict[str, float]:
    """Return tokens per second of the train phase, ``num_tokens`` counted once per epoch."""
    tokens = values["num_tokens"] * algorithm.num_epochs_per_batch
    return {"tokens_per_second_train": tokens / run.timers.seconds("train")}


def kl_to_reference(batch: PackedBatch) -> torch.Tensor:
    """Return k1 = old - reference logprob of every target [T]."""
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return batch.old_logprobs - batch.ref_logprobs


def scatter(minis: list[MiniBatch], into: Field, values: list[np.ndarray]) -> None:
    """Set a field of every microbatch from rank 0's values of each mini-batch, [S] or [T]."""
    for mini, given in zip(minis, values, strict=True):
        for batch, tokens in zip(mini.batches, scatter_to_packed(mini.packed, given), strict=True):
            setattr(batch, into, tokens)


def token_offsets(minis: list[MiniBatch]) -> np.ndarray:
    """Return [S + 1] int64 token offsets of the sequences, mini-batches end to end (rank 0)."""
    lengths = [np.zeros(1, dtype=np.int64), *(mini.batch.lengths for mini in minis)]
    return np.concatenate(lengths).cumsum()


def set_advantages(minis: list[MiniBatch], advantages: np.ndarray) -> None:
    """Set advantages [S] or [T], end to end, on the mini-batches, and their means on the samples.

    A sample without a target in the loss keeps its advantage.
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
                values = mini.advantages[span][targets[span]]
                sample.advantage = float(values[0] if (values == values[0]).all() else values.mean())
            elif count:
                sample.advantage = float(mini.advantages[row])


def gather(minis: list[MiniBatch], of: Callable[[PackedBatch], Any]) -> np.ndarray:
    """Gather ``of``'s value of each target, mini-batches end to end: float64 on rank 0, empty elsewhere."""
    found = [gather_from_packed(mini.packed, of) for mini in minis]
    return np.concatenate([np.zeros(0), *found])
