"""The trainer as algorithms see it; megarl/trainer/megatron/policy.py implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from megarl.losses.agreement import Agreement
from megarl.losses.base import Aggregation, Loss
from megarl.packing.token_values import Array
from megarl.records import PackedBatch, Sequence
from megarl.weights.checksum import RegionQuery
from megarl.weights.plan import Owner

Transport = Literal["auto", "shared_memory", "peer"]
LogprobField = Literal["old_logprobs", "ref_logprobs"]


@dataclass(slots=True)
class TrainStepResult:
    """One optimizer step, reduced over all ranks."""

    metrics: dict[str, float] = field(default_factory=dict)
    agreement: Agreement = field(default_factory=Agreement)


class PendingSave(Protocol):
    """A checkpoint that is being written in the background."""

    def done(self) -> bool:
        """Whether this rank's files are on disk."""
        ...

    def finish(self) -> None:
        """Wait until every rank's files are; all ranks call it. UserError where one could not be written."""
        ...


class Trained(Protocol):
    """One or several models with their optimizers. Every rank calls every method, in the same order."""

    def sleep(self, parts: SequenceOf[str]) -> None:
        """Give up the memory of "gradients" (freed) and "optimizer" (to the host) until :meth:`wake`."""
        ...

    def wake(self) -> None:
        """Undo :meth:`sleep`; without it, nothing. Training and saving do it by themselves."""
        ...

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """Write weights, optimizer and schedule as a Megatron distributed checkpoint."""
        ...

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """As ``save``, but return when this rank's part is copied to host memory and training may go on.

        Every rank then calls ``finish`` of the result, at the latest before another save.
        """
        ...

    def load(self, directory: Path) -> bool:
        """Read what ``save`` wrote, under this run's layout; whether random states were restored too."""
        ...


class Policy(Trained, Protocol):
    """Every rank calls every method, in the same order."""

    before_update: Callable[[], None] | None
    """Called by ``train_step`` on every rank just before it writes to the parameters."""
    num_computed_tokens: int
    """Tokens of the last ``prepare`` over all ranks, padding included and shared prompts counted once."""

    def prepare(
        self,
        sequences: list[Sequence],
        aggregation: Aggregation,
        *,
        group_size: int = 1,
        fixed_length: int | None = None,
        only: list[int] | None = None,
    ) -> list[PackedBatch]:
        """Plan and pack: this rank's microbatches of one optimizer step, weighed as token_weights says.

        Every ``group_size`` neighbours in ``sequences`` come to lie in one microbatch, in their order.
        With ``only`` (numbers of ``sequences``, ascending) the others count in the weights alone.
        """
        ...

    def fill_logprobs(
        self, batches: list[PackedBatch], into: LogprobField, *, temperature: float
    ) -> Agreement:
        """Forward only: set ``into`` of every microbatch to the current weights' logprobs."""
        ...

    def token_values(
        self,
        batches: list[PackedBatch],
        of: Callable[[PackedBatch], torch.Tensor],
        sequences: list[Sequence],
    ) -> list[Array]:
        """What ``of`` says [T] of each microbatch's targets, for all ``sequences``, on every rank.

        One [n] per sequence, aligned with its token ids, 0 where there is no target. ``of`` is called where
        logprobs are: on the last pipeline stage.
        """
        ...

    def sequence_logps(self, sequences: list[Sequence]) -> torch.Tensor:
        """Forward only: the summed logprob of each sequence's targets, [S] float64 on every rank."""
        ...

    def evaluate_loss(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """Forward only: the loss's sums over all ranks."""
        ...

    def train_step(
        self,
        batches: list[PackedBatch],
        loss: Loss,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> TrainStepResult:
        """Forward, backward, gradient reduction, clipping, optimizer and schedule.

        Logprobs and entropy are those of the distribution a sampler with this temperature, top_k (0: off)
        and top_p draws from. Its support is taken from the weights as they are now.
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

        Outside come the weights of the policy's own directory again: for use before training. UserError
        where the tensors of ``model_dir`` have other names or shapes.
        """
        ...

    def weight_owners(self, transport: Transport = "auto") -> list[Owner]:
        """What every rank offers to engines, on rank 0 (elsewhere empty); complete on every rank's device.

        Until the process ends its parameters must stay where they are; ``transport`` is weights.transport.
        With LoRA what is offered is a copy of the adapted layers with the adapters merged in.
        """
        ...

    def publish_weights(self) -> None:
        """Bring what was offered to engines up to date, before every hand-over and while they rest.

        When it returns, on any rank, the weights are complete on every rank's device: engines may read them.
        With LoRA adapters are merged; without it nothing is written, since engines read the parameters.
        """
        ...

    def weight_checksums(self, queries: list[RegionQuery]) -> dict[int, int]:
        """Number in ``queries`` -> checksum, of those that lie in this rank's memory."""
        ...

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the Hugging Face checkpoint, adapters merged, on rank 0 (elsewhere none)."""
        ...

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """With LoRA: every A and B by its name in PEFT's format, on rank 0 (elsewhere none)."""
        ...
