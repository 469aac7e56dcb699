"""Distillation: the divergence of a student's distribution p of each target from a teacher's q.

    forward KL(q || p)    reverse KL(p || q)    jensen_shannon (1 - beta) KL(p || M) + beta KL(q || M)

with M = (1 - beta) p + beta q (GKD: Agarwal et al. 2023, arXiv:2306.13649), both at one temperature. It is
exact over the vocabulary without materialising either model's full logits; forward may be restricted to the
teacher's top k. Metrics: ``loss`` and ``entropy`` are weighted means, ``divergence_max`` is the largest of a
token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megarl.losses.base import LossResult, LossTokens
from megarl.losses.hidden import Head, HiddenTokens
from megarl.ops.linear_vocab_kl import linear_vocab_kl
from megarl.ops.vocab_kl import vocab_kl_topk

_TOP_K_ROWS = 1024  # rows of teacher logits computed at a time


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """Kind of divergence and temperature of both distributions; ``top_k`` None: the whole vocabulary."""

    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    renormalize: bool = True


def distill_loss(
    options: DistillOptions, student: HiddenTokens, teacher: HiddenTokens, tokens: LossTokens
) -> LossResult:
    """Return the loss of one microbatch, with gradient to ``student.hidden``.

    Args:
        options: kind of divergence.
        student: at the targets, with gradient.
        teacher: at the same targets, without gradient.
        tokens: the student's logprobs at options.temperature, for the weights and metrics.
    """
    head = student.head
    if options.top_k is None:
        divergence = linear_vocab_kl(
            student.hidden,
            head.weight,
            teacher.hidden,
            teacher.head.weight,
            direction=options.divergence,
            temperature=options.temperature,
            beta=options.beta,
            tp_group=head.group,
        )
    else:
        ids, logprobs = top_k_logprobs(teacher.hidden, teacher.head, options.top_k, options.temperature)
        divergence = vocab_kl_topk(
            student.hidden @ head.weight.t(),
            ids,
            logprobs,
            renormalize=options.renormalize,
            temperature=options.temperature,
            vocab_start=head.vocab_start,
            tp_group=head.group,
        )
    loss = (tokens.weights * divergence).sum()
    sums = {
        "loss": loss.detach().double(),
        "entropy": (tokens.weights * tokens.entropy.detach()).double().sum(),
        "weight": tokens.weights.double().sum(),
    }
    maxima = {"divergence_max": divergence.detach().amax()} if divergence.numel() else {}
    return LossResult(loss, sums, {}, maxima)


def top_k_logprobs(
    hidden: torch.Tensor, head: Head, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [N, k] and full-vocabulary logprobs [N, k] of the most likely tokens, on every rank.

    hidden [N, H]. No gradient. ``k`` is limited to the size of the vocabulary.
    """
    parts = list(_top_k_parts(hidden, head, k, temperature))
    if not parts:
        empty = hidden.new_zeros(0, 1)
        return empty.long(), empty
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def _top_k_parts(
    hidden: torch.Tensor, head: Head, k: int, temperature: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, hidden.shape[0], _TOP_K_ROWS):
        with torch.no_grad():
            logits = (hidden[start : start + _TOP_K_ROWS] @ head.weight.t()).float() / temperature
            # Shards may hold fewer real rows than k, in different numbers: pad with -inf.
            padded = torch.nn.functional.pad(logits, (0, max(0, k - logits.shape[1])), value=-torch.inf)
            values, ids = padded.topk(k)
            ids = ids + head.vocab_start
            lse = logits.logsumexp(-1, keepdim=True)
            if head.group is not None:
                values, ids, lse = (
                    torch.cat(_all_gather(tensor, head.group), dim=1) for tensor in (values, ids, lse)
                )
            best, best_columns = values.topk(k)
            real = int((best > -torch.inf).sum(-1).min())
            yield (
                ids.gather(1, best_columns)[:, :real],
                (best - lse.logsumexp(-1, keepdim=True))[:, :real],
            )


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered
