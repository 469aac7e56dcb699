"""Exact divergences between a student's and a teacher's distribution over the vocabulary.

With p the student's softmax, q the teacher's, both at the same temperature:

    forward         KL(q || p) = sum_j q_j log(q_j / p_j)
    reverse         KL(p || q) = sum_j p_j log(p_j / q_j)
    jensen_shannon  (1 - beta) KL(p || M) + beta KL(q || M),  M = (1 - beta) p + beta q
                    (the generalised form of GKD, arXiv:2306.13649)

Gradients flow to the student only. Forward and reverse take one pass and one collective; Jensen-Shannon needs
both normalisers first and takes two of each. Values are exact to about 1e-6 absolute in float32: they are
differences of normalisers of order 10.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from megarl.ops._load import load_native
from megarl.ops._shards import LOGITS_CAUSE, check_finite, gather_shards, group_size, temperature_tensor

load_native()

Direction = Literal["forward", "reverse", "jensen_shannon"]


class _Divergence(NamedTuple):
    divergence: torch.Tensor


def vocab_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    direction: Direction = "forward",
    temperature: float | torch.Tensor = 1.0,
    beta: float = 0.5,
    tp_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = True,
    check_numerics: bool = False,
) -> torch.Tensor:
    """Return the divergence [R] between softmaxes of two logits shards [R, V_shard] of one dtype.

    temperature: positive, one number or [R]. beta is used by jensen_shannon only. The backward **overwrites
        the student's logits** unless inplace_backward is False (see ``token_logprob``).

    Raises:
        ValueError: wrong shapes and dtypes.
        FloatingPointError: with check_numerics, names the row.
    """
    _check_direction(direction)
    heat = temperature_tensor(temperature, student.device)
    if direction == "jensen_shannon":
        parts = torch.ops.megarl.vocab_kl(student.detach(), teacher.detach(), heat, True)
        lses = log_normalisers(_whole_row(parts, heat, tp_group), heat)
        result: torch.Tensor = _JensenShannon.apply(
            student, teacher.detach(), heat, *lses, beta, tp_group, inplace_backward
        )
    else:
        stats = torch.ops.megarl.vocab_kl(student, teacher.detach(), heat, inplace_backward)
        result = divergence(_whole_row(stats, heat, tp_group), direction)
    if check_numerics:
        check_finite("vocab_kl", _Divergence(result), cause=LOGITS_CAUSE)
    return result


def vocab_kl_topk(
    logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    renormalize: bool,
    temperature: float | torch.Tensor = 1.0,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the forward KL [R] from a teacher's top-k: sum_k q_k (log q_k - log p[id_k]).

    Gradient to the student only. logits [R, V_shard]; teacher_ids [R, K] int64 global and distinct within a
    row; teacher_logprobs [R, K]. With renormalize the K probabilities are scaled to sum to 1 (0 then means
    that the student matches on the K ids); without, the teacher's remaining mass is ignored. The backward
    overwrites logits.
    """
    if teacher_ids.shape != teacher_logprobs.shape or teacher_ids.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"megarl::vocab_kl_topk: teacher_ids {list(teacher_ids.shape)} and teacher_logprobs "
            f"{list(teacher_logprobs.shape)} must both be [{logits.shape[0]}, K]"
        )
    heat = temperature_tensor(temperature, logits.device)
    log_q = teacher_logprobs.to(torch.promote_types(logits.dtype, torch.float32))
    if renormalize:
        log_q = log_q.log_softmax(-1)
    q = log_q.exp()
    stats = _TopKStats.apply(logits, teacher_ids, q, heat, vocab_start)
    shards, extents = gather_shards(stats, tp_group, (vocab_start, logits.shape[1]))
    if extents is not None:
        end = max(start + columns for start, columns in extents)
        if teacher_ids.numel() and not 0 <= int(teacher_ids.min()) <= int(teacher_ids.max()) < end:
            raise ValueError(f"megarl::vocab_kl_topk: teacher_ids must lie in [0, {end})")
    maxima = shards[..., 0].detach()
    maximum = maxima.amax(0)
    shift = ((maxima - maximum) / heat).masked_fill(maxima == -torch.inf, 0.0)
    log_total = (shift.exp() * shards[..., 1]).sum(0).log() + maximum / heat
    cross_entropy = q.sum(-1) * log_total - shards[..., 2].sum(0) / heat
    return torch.xlogy(q, q).sum(-1) + cross_entropy


def merge_parts(parts: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Merge statistics of parts of a row [P, R, 6] to the whole row's [R, 6], differentiably."""
    if parts.shape[0] == 1:
        return parts[0]

    def shifts(column: int) -> tuple[torch.Tensor, torch.Tensor]:
        maxima = parts[..., column].detach()
        maximum = maxima.amax(0)
        # a part without finite logits has sums of 0, and its shift is -inf
        return maximum, ((maxima - maximum) / heat).masked_fill(maxima == -torch.inf, 0.0)

    (student_max, ds), (teacher_max, dt) = shifts(0), shifts(2)
    student, teacher, reverse, forward = (parts[..., column] for column in (1, 3, 4, 5))
    sums = (
        (ds.exp() * student).sum(0),
        (dt.exp() * teacher).sum(0),
        (ds.exp() * (reverse + (ds - dt) * student)).sum(0),
        (dt.exp() * (forward + (dt - ds) * teacher)).sum(0),
    )
    return torch.stack([student_max, sums[0], teacher_max, *sums[1:]], -1)


def divergence(stats: torch.Tensor, direction: Direction) -> torch.Tensor:
    """Return the forward or reverse KL [R] from a whole row's statistics [R, 6]."""
    student, teacher = stats[:, 1].log(), stats[:, 3].log()
    if direction == "reverse":
        return stats[:, 4] / stats[:, 1] - student + teacher
    return stats[:, 5] / stats[:, 3] - teacher + student


def log_normalisers(stats: torch.Tensor, heat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-sum-exp of student and of teacher logits over temperature, [R] each."""
    return stats[:, 0] / heat + stats[:, 1].log(), stats[:, 2] / heat + stats[:, 3].log()


def _whole_row(stats: torch.Tensor, heat: torch.Tensor, tp_group: dist.ProcessGroup | None) -> torch.Tensor:
    return merge_parts(gather_shards(stats, tp_group, (0, 0))[0], heat)


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse", "jensen_shannon"):
        raise ValueError(
            f"megarl::vocab_kl: direction must be forward, reverse or jensen_shannon; got {direction!r}"
        )


class _JensenShannon(torch.autograd.Function):
    """Sum over the shard, with one all-reduce; the backward needs the reduced first sum."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        heat: torch.Tensor,
        student_lse: torch.Tensor,
        teacher_lse: torch.Tensor,
        beta: float,
        tp_group: dist.ProcessGroup | None,
        inplace_backward: bool,
    ) -> torch.Tensor:
        sums = torch.ops.megarl.vocab_js(student, teacher, heat, student_lse, teacher_lse, beta)
        if group_size(tp_group) > 1:
            dist.all_reduce(sums, group=tp_group)
        ctx.save_for_backward(student, teacher, heat, student_lse, teacher_lse, sums)
        ctx.beta = beta
        ctx.inplace_backward = inplace_backward
        return (1 - beta) * sums[:, 0] + beta * sums[:, 1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, heat, student_lse, teacher_lse, sums = ctx.saved_tensors
        out = student.detach() if ctx.inplace_backward else student.clone()
        torch.ops.megarl.vocab_js_backward_(
            out, teacher, heat, student_lse, teacher_lse, ctx.beta, sums[:, 0], grads[0]
        )
        torch.autograd.graph.increment_version(out)
        return out, *(None,) * 7


class _TopKStats(torch.autograd.Function):
    """Return this shard's maximum, sum of exp, and sum of q_k x[id_k], [R, 3]; the maximum is a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ids: torch.Tensor,
        q: torch.Tensor,
        heat: torch.Tensor,
        vocab_start: int,
    ) -> torch.Tensor:
        nobody = ids.new_full((logits.shape[0],), vocab_start)
        stats = torch.ops.megarl.token_logprob(logits, nobody, heat, vocab_start, None, None, True)
        here = (ids >= vocab_start) & (ids < vocab_start + logits.shape[1])
        columns = (ids - vocab_start).clamp(0, logits.shape[1] - 1)
        chosen = (q * logits.gather(1, columns)).masked_fill(~here, 0.0).sum(-1)
        ctx.save_for_backward(logits, nobody, columns, q * here, heat, stats)
        ctx.vocab_start = vocab_start
        return torch.stack([stats[:, 0], stats[:, 1], chosen], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, nobody, columns, q, heat, stats = ctx.saved_tensors
        out = logits.detach()
        grad_stats = torch.zeros_like(stats)
        grad_stats[:, 1] = grads[0][:, 1]
        torch.ops.megarl.token_logprob_backward_(
            out, nobody, heat, ctx.vocab_start, None, None, stats[:, 0], grad_stats
        )
        out.scatter_add_(1, columns, (q * grads[0][:, 2:]).to(out.dtype))
        torch.autograd.graph.increment_version(out)
        return out, None, None, None, None


@torch.library.register_fake("megarl::vocab_kl")
def _fake_stats(student: torch.Tensor, *_: Any) -> torch.Tensor:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[0], 6, dtype=dtype)


@torch.library.register_fake("megarl::vocab_js")
def _fake_js(student: torch.Tensor, *rest: Any) -> torch.Tensor:
    return rest[2].new_empty(student.shape[0], 2)


@torch.library.register_fake("megarl::vocab_kl_backward_")
@torch.library.register_fake("megarl::vocab_js_backward_")
def _fake_backward(*_: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    student, teacher, heat, inplace_backward = inputs
    ctx.save_for_backward(student, teacher, heat, output)
    ctx.inplace_backward = inplace_backward


def _backward(ctx: Any, grad_stats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    student, teacher, heat, stats = ctx.saved_tensors
    out = student.detach() if ctx.inplace_backward else student.clone()
    torch.ops.megarl.vocab_kl_backward_(out, teacher, heat, stats[:, 0:3:2], grad_stats)
    torch.autograd.graph.increment_version(out)
    return out, None, None, None


torch.library.register_autograd("megarl::vocab_kl", _backward, setup_context=_save)
