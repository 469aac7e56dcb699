"""A frozen teacher beside the student, under the same parallel layout, and the student's step towards it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.losses.agreement import Agreement, measure_agreement
from megarl.losses.base import LossResult
from megarl.ops import linear_token_logprob
from megarl.ops.linear_vocab_kl import linear_vocab_kl
from megarl.ops.vocab_kl import vocab_kl_topk
from megarl.records import PackedBatch
from megarl.trainer.megatron.head import HeadShard, OnHidden, Sampler, rows_of
from megarl.trainer.megatron.policy import MegatronPolicy
from megarl.trainer.policy import TrainStepResult

_TOP_K_ROWS = 1024  # teacher's logits that exist at a time


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """Which divergence, at which temperature of both distributions; ``top_k`` None: the whole vocabulary."""

    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    renormalize: bool = True


class Distiller:
    """Moves ``student`` towards ``teacher`` on packed sequences. Every rank calls every method."""

    def __init__(self, student: MegatronPolicy, teacher: MegatronPolicy, options: DistillOptions) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self._hidden: dict[int, torch.Tensor] = {}  # id of a microbatch -> the teacher's, at its targets

    def read_teacher(self, batches: list[PackedBatch]) -> None:
        """Forward pass of the teacher; its hidden states [N, H] at the targets stay until :meth:`forget`."""

        def keep(
            batch: PackedBatch, rows: torch.Tensor, hidden: torch.Tensor, _head: HeadShard
        ) -> LossResult:
            self._hidden[id(batch)] = rows_of(hidden, rows, self.teacher.context.layout)
            return LossResult(hidden.sum())

        with torch.no_grad():
            self.teacher._run(batches, OnHidden(keep), Sampler(), forward_only=True)

    def forget(self) -> None:
        """Give the teacher's hidden states up."""
        self._hidden.clear()

    def step(self, batches: list[PackedBatch]) -> TrainStepResult:
        """Forward, backward and optimizer step of the student; the divergence over all ranks."""
        agreement = Agreement()

        def learn(
            batch: PackedBatch, rows: torch.Tensor, hidden: torch.Tensor, head: HeadShard
        ) -> LossResult:
            nonlocal agreement
            student = rows_of(hidden, rows, self.student.context.layout)
            result, found = self._loss(batch, rows, student, head)
            agreement = agreement + found
            return result

        metrics = self.student._optimizer_step(batches, OnHidden(learn), Sampler())
        return TrainStepResult(metrics, self.student._reduce_agreement(agreement))

    def _loss(
        self, batch: PackedBatch, rows: torch.Tensor, student: torch.Tensor, head: HeadShard
    ) -> tuple[LossResult, Agreement]:
        assert batch.loss_weights is not None
        options, group = self.options, _tensor_group(head)
        weights, teacher = batch.loss_weights[rows], self._hidden[id(batch)]
        teacher_head = self.teacher.head_shard()
        if options.top_k is None:
            divergence = linear_vocab_kl(
                student,
                head.weight,
                teacher,
                teacher_head.weight,
                direction=options.divergence,
                temperature=options.temperature,
                beta=options.beta,
                tp_group=group,
            )
        else:
            ids, logprobs = top_k_logprobs(teacher, teacher_head, options.top_k, options.temperature)
            divergence = vocab_kl_topk(
                student @ head.weight.t(),
                ids,
                logprobs,
                renormalize=options.renormalize,
                temperature=options.temperature,
                vocab_start=head.vocab_start,
                tp_group=group,
            )
        with torch.no_grad():
            out = linear_token_logprob(
                student.detach(),
                head.weight,
                batch.labels[rows],
                temperature=options.temperature,
                vocab_start=head.vocab_start,
                tp_group=group,
            )
        agreement = Agreement()
        if batch.rollout_logprobs is not None:
            agreement = measure_agreement(
                out.logprob, batch.rollout_logprobs[rows], batch.labels[rows], batch.sequence_ids[rows]
            )
        loss = (weights * divergence).sum()
        sums = {
            "loss": loss.detach().double(),
            "entropy": (weights * out.entropy).double().sum(),
            "weight": weights.double().sum(),
        }
        maxima = {"divergence_max": divergence.detach().amax()} if divergence.numel() else {}
        return LossResult(loss, sums, {}, maxima), agreement


def top_k_logprobs(
    hidden: torch.Tensor, head: HeadShard, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N, k] and logprobs [N, k] (of the whole vocabulary) of the likeliest tokens, on every rank.

    hidden [N, H]. No gradient. ``k`` beyond the vocabulary takes all of it.
    """
    parts = list(_top_k_parts(hidden, head, k, temperature))
    if not parts:
        empty = hidden.new_zeros(0, 1)
        return empty.long(), empty
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def _top_k_parts(
    hidden: torch.Tensor, head: HeadShard, k: int, temperature: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    group, size = _tensor_group(head), head.layout.tensor
    for start in range(0, hidden.shape[0], _TOP_K_ROWS):
        with torch.no_grad():
            logits = (hidden[start : start + _TOP_K_ROWS] @ head.weight.t()).float() / temperature
            # Shards may hold fewer real rows than k, and not all as many: filled up with -inf.
            padded = torch.nn.functional.pad(logits, (0, max(0, k - logits.shape[1])), value=-torch.inf)
            values, ids = padded.topk(k)
            ids = ids + head.vocab_start
            lse = logits.logsumexp(-1, keepdim=True)
            if group is not None:
                values, ids, lse = (
                    torch.cat(_all_gather(tensor, group, size), dim=1) for tensor in (values, ids, lse)
                )
            best, places = values.topk(k)
            real = int((best > -torch.inf).sum(-1).min())
            yield (
                ids.gather(1, places)[:, :real],
                (best - lse.logsumexp(-1, keepdim=True))[:, :real],
            )


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup, size: int) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered


def _tensor_group(head: HeadShard) -> dist.ProcessGroup | None:
    return parallel_state.get_tensor_model_parallel_group() if head.layout.tensor > 1 else None
