"""The trainer's interface for algorithms. A backend is one folder next to ``megatron`` that implements it.

A trainer holds one model, sharded over all ranks, and knows no algorithm: it runs passes over packed
microbatches and calls the caller's function on the last stage's :class:`Output`. The passes of PPO's critic,
reward models, distillation and policy losses are in :mod:`megarl.trainer.passes`, for any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from megarl import platform
from megarl.batching.rank_microbatches import PackedStep
from megarl.config.parallel import ParallelConfig
from megarl.config.trainer import TrainerConfig
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.losses.base import Aggregation, LossResult
from megarl.models.table import Architecture
from megarl.records import PackedBatch, TrainBatch
from megarl.trainer.outputs import Output, Read
from megarl.weights.checksum import RegionQuery
from megarl.weights.plan import Owner

Transport = Literal["auto", "shared_memory", "peer"]


@dataclass(frozen=True, slots=True)
class RankContext:
    """This process's rank, layout and platform."""

    rank: int
    layout: ParallelLayout
    at: RankCoordinates
    platform: platform.Platform
    parallel: ParallelConfig
    seed: int = 0  # of random numbers that are equal on all ranks
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def is_first(self) -> bool:
        """True on rank 0, which drives the engines and writes the logs."""
        return self.rank == 0

    @property
    def has_results(self) -> bool:
        """True if this rank reports a pass's results: on the last stage, one of the tensor ranks."""
        return self.at.tensor == 0 and self.at.pipeline == self.layout.pipeline - 1


class PendingSave(Protocol):
    """A checkpoint being written in the background."""

    def done(self) -> bool:
        """Return True if this rank's files are on disk."""
        ...

    def finish(self) -> None:
        """Wait for every rank's files; all ranks call it. UserError if one could not be written."""
        ...


class Checkpointable(Protocol):
    """One or several models with their optimizers. Every rank calls every method, in the same order."""

    def sleep(self, parts: Sequence[str]) -> None:
        """Release the memory of "gradients" (freed) and "optimizer" (to the host) until :meth:`wake`."""
        ...

    def wake(self) -> None:
        """Undo :meth:`sleep`; otherwise do nothing. Training and saving call it themselves."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank holds on its device, by part, as the storages of tensors.

        Parts are parameters, gradients, optimizer, reference, merged (LoRA's copy for engines) and critic;
        those that are empty, or asleep on the host of a GPU, are left out. Not collective.
        """
        ...

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """Write weights, optimizer and schedule as a distributed checkpoint."""
        ...

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """See ``save``; returns once this rank's part is in host memory, so training can continue.

        Every rank then calls ``finish`` of the result, before the next save at the latest.
        """
        ...

    def load(self, directory: Path, *, optimizer: bool = True) -> bool:
        """Read what ``save`` wrote, under this run's layout; return True if random states were restored too.

        Without ``optimizer``, a checkpoint saved without one can be read, for its weights.
        """
        ...


class Weights(Protocol):
    """A trainer's weights for engines, checks and export. Every rank calls every method, in order."""

    def owners(self, transport: Transport = "auto") -> list[Owner]:
        """Return every rank's parameters for engines, on rank 0 (elsewhere empty), complete on every device.

        The parameters must not move until the process ends; ``transport`` is weights.transport. With LoRA,
        engines get a copy of the adapted layers with the adapters merged in.
        """
        ...

    def publish(self) -> None:
        """Update the weights that engines read, before every weight sync and while engines are paused.

        When it returns, on any rank, the weights are complete on every rank's device: engines may read them.
        With LoRA, adapters are merged; otherwise nothing is written, since engines read the parameters.
        """
        ...

    def checksums(self, queries: Sequence[RegionQuery]) -> dict[int, int]:
        """Return checksums by index in ``queries``, for the regions in this rank's memory."""
        ...

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the Hugging Face checkpoint, adapters merged, on rank 0 (elsewhere none)."""
        ...

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """With LoRA, yield every A and B by its name in PEFT's format, on rank 0 (elsewhere none)."""
        ...


class Trainer(Checkpointable, Protocol):
    """One model on all ranks. Every rank calls every method, in the same order."""

    before_update: Callable[[], None] | None
    """Called by :meth:`optimizer_step` on every rank just before it writes to the parameters."""

    @property
    def context(self) -> RankContext:
        """This rank's context."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
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
        """Run a pass over this rank's microbatches, calling ``fn`` on each one's output on the last stage.

        With ``grad``, gradients of the losses are accumulated. Returns ``fn``'s results (without None), and
        nothing on ranks whose results duplicate another rank's.

        Raises:
            UserError: with debug.check_numerics, a value is not finite; names the token.
        """
        ...

    def optimizer_step(
        self, batches: list[PackedBatch], fn: Callable[[Output], LossResult]
    ) -> dict[str, float]:
        """Forward, backward, gradient reduction, clipping, optimizer and schedule.

        Returns the losses' metrics over all ranks (reduce_results) with ``grad_norm``, ``lr`` and
        ``non_finite_weights`` (weights_report), equal on every rank.
        """
        ...

    def keep_reference(self) -> None:
        """Keep the current weights as the reference; with LoRA it is the model without its adapters."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the reference weights (pointers are swapped)."""
        ...

    def weights_of(self, model_dir: str) -> AbstractContextManager[None]:
        """Inside, the model computes with the weights of another directory of the same architecture.

        On exit the weights of the trainer's own directory are loaded again, so use it before training.
        UserError if the tensors of ``model_dir`` have other names or shapes.
        """
        ...
