"""vocab_kl and linear_vocab_kl against float64 formulas and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarl.ops import linear_vocab_kl, vocab_kl, vocab_kl_topk
from tests.oracles import ops as reference

DIRECTIONS = ["forward", "reverse", "jensen_shannon"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 8e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
BACKWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 8e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def pair(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    student = 3 * torch.randn(rows, columns, generator=generator)
    teacher = student + torch.randn(rows, columns, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def weights(rows: int) -> torch.Tensor:
    return torch.linspace(-1, 2, rows)


def close(mine: torch.Tensor | None, theirs: torch.Tensor | None, tolerance: float) -> None:
    assert mine is not None and theirs is not None
    torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("columns", [1, 33, 3001])
def test_matches_float64(direction: Any, dtype: torch.dtype, columns: int) -> None:
    student, teacher = pair(6, columns, dtype)
    heat = torch.linspace(0.6, 1.7, 6)
    exact = student.double().requires_grad_()
    expected = reference.vocab_kl(exact, teacher.double(), direction, heat.double(), beta=0.3)
    expected.backward(weights(6).double())
    student.requires_grad_()
    ours = vocab_kl(student, teacher, direction=direction, temperature=heat, beta=0.3, inplace_backward=False)
    ours.backward(weights(6).to(ours.dtype))
    close(ours, expected, TOLERANCE[dtype])
    close(student.grad, exact.grad, BACKWARD_TOLERANCE[dtype])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tokens_both_exclude_count_as_nothing(direction: Any) -> None:
    student, teacher = pair(3, 2100, torch.float32)
    student[:, 1000:1500] = -torch.inf
    teacher[:, 1000:1500] = -torch.inf
    keep = torch.cat([torch.arange(1000), torch.arange(1500, 2100)])
    expected = reference.vocab_kl(student[:, keep].double(), teacher[:, keep].double(), direction)
    student.requires_grad_()
    ours = vocab_kl(student, teacher, direction=direction, inplace_backward=False)
    close(ours, expected, 8e-6)
    ours.sum().backward()
    assert student.grad is not None and torch.count_nonzero(student.grad[:, 1000:1500]) == 0


def test_forward_kl_is_infinite_where_the_student_excludes_what_the_teacher_does_not() -> None:
    student, teacher = pair(2, 100, torch.float32)
    student[1, 7] = -torch.inf
    assert torch.isfinite(vocab_kl(student, teacher)[0]) and vocab_kl(student, teacher)[1] == torch.inf
    close(
        vocab_kl(student, teacher, direction="reverse"),
        reference.vocab_kl(student.double(), teacher.double(), "reverse"),
        8e-6,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_distributions_have_none(direction: Any) -> None:
    student, _ = pair(4, 50_000, torch.float32)
    student.requires_grad_()
    ours = vocab_kl(student, student.detach() + 7.0, direction=direction, inplace_backward=False)
    ours.sum().backward()
    close(ours, torch.zeros(4), 4e-6)
    close(student.grad, torch.zeros_like(student), 1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_backward_overwrites_the_student(direction: Any) -> None:
    student, teacher = pair(4, 2050, torch.float32)
    copy = student.clone().requires_grad_()
    vocab_kl(copy, teacher, direction=direction, inplace_backward=False).backward(weights(4))
    leaf = student.clone().requires_grad_()
    buffer = leaf * 1.0
    vocab_kl(buffer, teacher, direction=direction).backward(weights(4))
    assert copy.grad is not None and leaf.grad is not None
    assert torch.equal(copy.grad, leaf.grad) and torch.equal(buffer.detach(), leaf.grad)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("max_extra_bytes", [2**20, 20_000, 40])
def test_linear_matches_float64_for_any_tile(direction: Any, max_extra_bytes: int) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(301, 8, generator=generator)
    teacher = torch.randn(9, 12, generator=generator), torch.randn(301, 12, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference.vocab_kl(exact[0] @ exact[1].T, (teacher[0] @ teacher[1].T).double(), direction, 1.3)
    expected.backward(weights(9).double())
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    ours = linear_vocab_kl(
        leaves[0],
        leaves[1],
        teacher[0],
        teacher[1],
        direction=direction,
        temperature=1.3,
        max_extra_bytes=max_extra_bytes,
    )
    ours.backward(weights(9))
    close(ours, expected, 3e-5)
    for mine, theirs in zip(leaves, exact, strict=True):
        close(mine.grad, theirs.grad, 5e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_topk_of_the_teacher(renormalize: bool) -> None:
    student, teacher = pair(5, 2500, torch.float32)
    log_q, ids = torch.log_softmax(teacher, -1).topk(20)
    exact = student.double().requires_grad_()
    log_p = torch.log_softmax(exact / 0.9, -1).gather(1, ids)
    exact_q = log_q.double().log_softmax(-1) if renormalize else log_q.double()
    expected = (exact_q.exp() * (exact_q - log_p)).sum(-1)
    expected.backward(weights(5).double())
    leaf = student.clone().requires_grad_()
    ours = vocab_kl_topk(leaf * 1.0, ids, log_q, renormalize=renormalize, temperature=0.9)
    ours.backward(weights(5))
    close(ours, expected, 8e-6)
    close(leaf.grad, exact.grad, 8e-6)
    if renormalize:
        own, chosen = student, ids
        agreed = torch.log_softmax(own.gather(1, chosen), -1)
        masked = torch.full_like(own, -torch.inf).scatter(1, chosen, own.gather(1, chosen))
        close(vocab_kl_topk(masked, chosen, agreed, renormalize=True), torch.zeros(5), 4e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: Any) -> None:
    student, teacher = pair(3, 11, torch.float64)

    def loss(values: torch.Tensor) -> Any:
        return vocab_kl(
            values, teacher, direction=direction, temperature=0.8, beta=0.3, inplace_backward=False
        )

    torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def test_opcheck() -> None:
    student, teacher = pair(3, 40, torch.float32)
    heat = torch.ones(1)
    torch.library.opcheck(
        torch.ops.megarl.vocab_kl.default, (student.clone().requires_grad_(), teacher, heat, False)
    )
    lse = torch.logsumexp(student, -1), torch.logsumexp(teacher, -1)
    torch.library.opcheck(torch.ops.megarl.vocab_js.default, (student, teacher, heat, *lse, 0.5))
    torch.library.opcheck(
        torch.ops.megarl.vocab_js_backward_.default,
        (student.clone(), teacher, heat, *lse, 0.5, torch.ones(3), torch.ones(3)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(2, 9)}, r"vocab_kl: teacher must have shape \[2, 8\], got \[2, 9\]"),
        ({"teacher": torch.zeros(2, 8).half()}, r"vocab_kl: teacher is Half, student Float"),
        ({"temperature": -1.0}, r"vocab_kl: temperature\[0\] must be positive and finite, got -1"),
        ({"direction": "both"}, r"vocab_kl: direction must be forward.*got 'both'"),
        ({"direction": "jensen_shannon", "beta": 1.0}, r"vocab_js: beta must lie between 0 and 1, got 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"student": torch.zeros(2, 8), "teacher": torch.zeros(2, 8), **change}
    with pytest.raises(ValueError, match=message):
        vocab_kl(**arguments)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_check_numerics_names_the_row(direction: Any) -> None:
    student, teacher = pair(4, 1500, torch.float32)
    student[2, 1111] = torch.nan
    with pytest.raises(FloatingPointError, match="megarl::vocab_kl: divergence of row 2 is nan"):
        vocab_kl(student, teacher, direction=direction, check_numerics=True)
