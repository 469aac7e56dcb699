"""What the optimizer steps of an online step learn from: rank 0's samples, every rank's microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megarl.algorithms.rollouts import split_groups
from megarl.losses.base import Aggregation
from megarl.packing.samples import train_batch
from megarl.records import Group, PackedBatch, Sample, TrainBatch
from megarl.trainer.batches import PackedStep, gather_from_packed
from megarl.trainer.control import from_first_rank
from megarl.trainer.interface import Trainer


@dataclass(slots=True)
class Part:
    """One optimizer step. All but what is packed is rank 0's; other ranks have an empty batch."""

    samples: list[Sample] = field(default_factory=list)
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
        for samples in split_groups(groups, number):
            if kept := [sample for sample in samples if not leave_out(sample)]:
                batch = train_batch(kept, version)
                parts.append(Part(kept, batch, batch.num_targets()))
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


def gather_parts(parts: list[Part], of: Callable[[PackedBatch], Any]) -> np.ndarray:
    """What ``of`` says of each target: all parts' tokens end to end, float64, on rank 0; elsewhere empty."""
    found = [gather_from_packed(part.packed, of) for part in parts]
    return np.concatenate([np.zeros(0), *found])
