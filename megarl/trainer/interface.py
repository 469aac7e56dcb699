"""The trainer as algorithms see it. A backend is one folder beside ``megatron`` that implements it.

A trainer holds one model, sharded over all ranks, and knows no algorithm: it computes passes over packed
microbatches, and a function that the caller brings looks at the last stage's :class:`Output`. What PPO's
critic, a reward model, distillation and every policy loss need of a pass is in
:mod:`megarl.trainer.passes`, which works with any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from megarl import platform
from megarl.batching.rank_microbatches import PackedStep
from megarl.config.parallel import ParallelConfig
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.losses.base import Aggregation, LossResult
from megarl.models.table import Architecture
from megarl.records import PackedBatch, TrainBatch
from megarl.trainer.outputs import Output
from megarl.weights.checksum import RegionQuery
from megarl.weights.plan import Owner

Transport = Literal["auto", "shared_memory", "peer"]
Read = Callable[[Output], LossResult | None]
"""What a pass does with each microbatch: its loss and figures, or None where it only reads."""


@dataclass(frozen=True, slots=True)
class RankContext:
    """Who this process is."""

    rank: int
    layout: ParallelLayout
    at: RankCoordinates
    platform: platform.Platform
    parallel: ParallelConfig
    seed: int = 0  # of whatever is drawn alike on all ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that talks to engines and people."""
        return self.rank == 0

    @property
    def has_results(self) -> bool:
        """Whether this rank reports a pass's results: on the last stage, one of the tensor ranks."""
        return self.at.tensor == 0 and self.at.pipeline == self.layout.pipeline - 1


class PendingSave(Protocol):
    """A checkpoint that is being written in the background."""

    def done(self) -> bool:
        """Whether this rank's files are on disk."""
        ...

    def finish(self) -> None:
        """Wait until every rank's files are; all ranks call it. UserError where one could not be written."""
        ...


class Checkpointable(Protocol):
    """One or several models with their optimizers. Every rank calls every method, in the same order."""

    def sleep(self, parts: Sequence[str]) -> None:
        """Give up the memory of "gradients" (freed) and "optimizer" (to the host) until :meth:`wake`."""
        ...

    def wake(self) -> None:
        """Undo :meth:`sleep`; without it, nothing. Training and saving do it by themselves."""
        ...

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """Write weights, optimizer and schedule as a distributed checkpoint."""
        ...

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """As ``save``, but return when this rank's part is copied to host memory and training may go on.

        Every rank then calls ``finish`` of the result, at the latest before another save.
        """
        ...

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """Read what ``save`` wrote, under this run's layout; whether random states were restored too.

        Without ``optimizer`` what was saved without one can be read: for its weights.
        """
        ...


class Weights(Protocol):
    """A trainer's weights as others read them. Every rank calls every method, in the same order."""

    def owners(self, transport: Transport = "auto") -> list[Owner]:
        """What every rank offers to engines, on rank 0 (elsewhere empty); complete on every rank's device.

        Until the process ends its parameters must stay where they are; ``transport`` is weights.transport.
        With LoRA what is offered is a copy of the adapted layers with the adapters merged in.
        """
        ...

    def publish(self) -> None:
        """Bring what was offered to engines up to date, before every weight sync and while they rest.

        When it returns, on any rank, the weights are complete on every rank's device: engines may read them.
        With LoRA adapters are merged; without it nothing is written, since engines read the parameters.
        """
        ...

    def checksums(self, queries: Sequence[RegionQuery]) -> dict[int, int]:
        """Number in ``queries`` -> checksum, of those that lie in this rank's memory."""
        ...

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the Hugging Face checkpoint, adapters merged, on rank 0 (elsewhere none)."""
        ...

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """With LoRA: every A and B by its name in PEFT's format, on rank 0 (elsewhere none)."""
        ...


class Trainer(Checkpointable, Protocol):
    """One model on all ranks. Every rank calls every method, in the same order."""

    before_update: Callable[[], None] | None
    """Called by :meth:`optimizer_step` on every rank just before it writes to the parameters."""

    @property
    def context(self) -> RankContext:
        """This rank."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The model."""
        ...

    @property
    def weights(self) -> Weights:
        """The parameters, for engines, checks and export."""
        ...

    def prepare(
        self,
        batch: TrainBatch | None,
        aggregation: Aggregation,
        *,
        group_size: int = 1,
        fixed_length: int | None = None,
        only: np.ndarray | list[int] | None = None,
        advantages: np.ndarray | None = None,
        scatter: bool = False,
    ) -> PackedStep:
        """Plan and pack an optimizer step: :meth:`~megarl.batching.rank_microbatches.BatchMaker.prepare`."""
        ...

    def run(self, batches: list[PackedBatch], fn: Read, *, grad: bool = False) -> list[LossResult]:
        """A pass over this rank's microbatches: ``fn`` of each one's output on the last stage.

        With ``grad`` gradients of the losses are added to those there are. Returns what ``fn`` returned
        (None left out), and nothing where these results are copies of another rank's.

        Raises:
            UserError: with debug.check_numerics, a value that is not finite; it names the token.
        """
        ...

    def optimizer_step(
        self, batches: list[PackedBatch], fn: Callable[[Output], LossResult]
    ) -> dict[str, float]:
        """Forward, backward, gradient reduction, clipping, optimizer and schedule.

        Returns the losses' figures over all ranks (reduce_results) with ``grad_norm``, ``lr`` and
        ``non_finite_weights`` (weights_report), equal on every rank.
        """
        ...

    def keep_reference(self) -> None:
        """Remember the present weights as the reference; with LoRA it is the model without its adapters."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the reference weights (an exchange of pointers)."""
        ...

    def weights_of(self, model_dir: str) -> AbstractContextManager[None]:
        """Inside, the model computes with the weights of another directory of the same architecture.

        Outside come the weights of the trainer's own directory again: for use before training. UserError
        where the tensors of ``model_dir`` have other names or shapes.
        """
        ...
