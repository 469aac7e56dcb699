"""token_logprob and linear_token_logprob against float64 formulas, finite differences and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megarl.ops import linear_token_logprob, token_logprob
from tests.oracles import ops as reference

# Relative to values of order 10: float32 sums over thousands of exponentials; 16-bit logits are exact
# inputs, only their gradient is rounded to 16 bits.
FORWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
BACKWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = list(FORWARD_TOLERANCE)


def sample_logits(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 4).to(dtype)


def sample_targets(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))


def weigh(logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A scalar in which every row's logprob and entropy count differently."""
    weights = torch.linspace(-1, 2, logprob.numel(), dtype=logprob.dtype)
    return (weights * logprob).sum() + 0.3 * (weights.flip(0) * entropy).sum()


def compare(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 1024, 5003])
def test_matches_float64(dtype: torch.dtype, columns: int) -> None:
    logits = sample_logits(9, columns, dtype).requires_grad_()
    targets = sample_targets(9, columns)
    temperature = torch.linspace(0.5, 2, 9)
    exact = logits.detach().double().requires_grad_()
    expected = reference.token_logprob(exact, targets, temperature.double())
    weigh(*expected).backward()
    ours = token_logprob(logits, targets, temperature=temperature, inplace_backward=False)
    weigh(*ours).backward()
    compare(ours, expected, FORWARD_TOLERANCE[dtype])
    assert logits.grad is not None and exact.grad is not None
    compare((logits.grad,), (exact.grad,), BACKWARD_TOLERANCE[dtype])


def test_long_vocabulary_keeps_its_precision() -> None:
    logits = sample_logits(2, 262_144, torch.float32) + 300  # a common offset must not cost digits
    targets = sample_targets(2, 262_144)
    compare(token_logprob(logits, targets), reference.token_logprob(logits.double(), targets), 4e-6)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 3e4])
def test_extreme_logits(scale: float) -> None:
    logits = sample_logits(6, 3000, torch.float32) * scale
    targets = logits.argmax(-1)
    expected = reference.token_logprob(logits.double(), targets)
    compare(token_logprob(logits, targets), expected, 4e-6)


def test_backward_overwrites_the_logits_and_equals_the_copying_backward() -> None:
    targets = sample_targets(5, 2050)
    plain = sample_logits(5, 2050, torch.float32).requires_grad_()
    weigh(*token_logprob(plain, targets, inplace_backward=False)).backward()
    leaf = sample_logits(5, 2050, torch.float32).requires_grad_()
    logits = leaf * 1.0
    weigh(*token_logprob(logits, targets)).backward()
    assert leaf.grad is not None and plain.grad is not None
    assert torch.equal(leaf.grad, plain.grad)
    assert torch.equal(logits.detach(), plain.grad)


def test_second_backward_through_overwritten_logits_is_refused() -> None:
    logits = sample_logits(3, 40, torch.float32).requires_grad_() * 1.0
    loss = weigh(*token_logprob(logits, sample_targets(3, 40)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_row_index_leaves_other_rows_without_gradient(inplace: bool) -> None:
    logits = sample_logits(8, 1500, torch.float32).requires_grad_()
    rows = torch.tensor([6, 0, 3])
    targets = sample_targets(3, 1500)
    chosen = logits.detach()[rows].clone().requires_grad_()
    weigh(*token_logprob(chosen, targets, inplace_backward=False)).backward()
    buffer = logits * 1.0
    ours = token_logprob(buffer, targets, row_index=rows, inplace_backward=inplace)
    weigh(*ours).backward()
    assert logits.grad is not None and chosen.grad is not None
    expected = torch.zeros_like(logits).index_copy(0, rows, chosen.grad)
    assert torch.equal(logits.grad, expected)


def test_row_stride_is_free() -> None:
    wide = sample_logits(7, 4000, torch.float32)
    narrow = wide[::2, 100:1777]
    targets = sample_targets(4, 1677)
    compare(token_logprob(narrow, targets), token_logprob(narrow.contiguous(), targets), 0.0)


def test_masked_columns_get_exactly_no_gradient() -> None:
    logits = sample_logits(4, 2500, torch.float32)
    logits[:, 700:2100] = -torch.inf
    targets = torch.tensor([0, 699, 2100, 2499])
    kept = torch.cat([logits[:, :700], logits[:, 2100:]], 1)
    expected = reference.token_logprob(kept.double(), torch.tensor([0, 699, 700, 1099]))
    logits.requires_grad_()
    ours = token_logprob(logits, targets, inplace_backward=False)
    compare(ours, expected, 4e-6)
    weigh(*ours).backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[:, 700:2100]) == 0


def test_support_is_the_logits_at_or_above_min_logit_and_the_target() -> None:
    logits = sample_logits(5, 3001, torch.float32)
    targets = sample_targets(5, 3001)
    min_logit = logits.sort(-1, descending=True).values[:, 20].contiguous()
    exact = logits.double().requires_grad_()
    expected = reference.token_logprob(exact, targets, 0.8, min_logit.double())
    weigh(*expected).backward()
    logits.requires_grad_()
    ours = token_logprob(logits, targets, temperature=0.8, min_logit=min_logit, inplace_backward=False)
    weigh(*ours).backward()
    compare(ours, expected, 4e-6)
    assert logits.grad is not None and exact.grad is not None
    compare((logits.grad,), (exact.grad,), 4e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    logits = sample_logits(rows, 100, torch.float32).requires_grad_()
    result = token_logprob(logits, sample_targets(rows, 100), inplace_backward=False)
    weigh(*result).backward()
    compare(result, reference.token_logprob(logits.detach().double(), sample_targets(rows, 100)), 4e-6)


def head_case(
    rows: int, hidden: int, columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (torch.randn(columns, hidden, generator=generator) * 0.3).to(dtype)
    return states, weight, sample_targets(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_extra_bytes", [64 * 2**20, 60_000, 100])
def test_linear_matches_float64_for_any_tile(dtype: torch.dtype, max_extra_bytes: int) -> None:
    hidden, weight, targets = head_case(37, 24, 611, dtype)
    temperature = torch.linspace(0.6, 1.4, 37)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = reference.token_logprob(exact[0] @ exact[1].T, targets, temperature.double())
    weigh(*expected).backward()
    ours = [tensor.requires_grad_() for tensor in (hidden, weight)]
    result = linear_token_logprob(
        ours[0], ours[1], targets, temperature=temperature, max_extra_bytes=max_extra_bytes
    )
    weigh(*result).backward()
    # bf16 logits are rounded to 8 bits of mantissa before anything else, as in an eager head
    forward, backward = {
        torch.float64: (1e-6, 1e-6),
        torch.float32: (1e-5, 2e-5),
        torch.bfloat16: (5e-2, 1.5e-1),
    }[dtype]
    compare(result, expected, forward)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        compare((mine.grad,), (theirs.grad,), backward)


def test_linear_row_index_and_frozen_weight() -> None:
    hidden, weight, targets = head_case(12, 8, 300, torch.float32)
    rows = torch.tensor([11, 2, 5])
    hidden.requires_grad_()
    weigh(*linear_token_logprob(hidden, weight, targets[:3], row_index=rows)).backward()
    exact = hidden.detach().double().requires_grad_()
    weigh(*reference.token_logprob(exact[rows] @ weight.double().T, targets[:3])).backward()
    assert hidden.grad is not None and exact.grad is not None and weight.grad is None
    compare((hidden.grad,), (exact.grad,), 2e-5)


def test_linear_without_rows_has_a_zero_gradient() -> None:
    hidden, weight, targets = head_case(0, 8, 300, torch.float32)
    weight.requires_grad_()
    weigh(*linear_token_logprob(hidden, weight, targets)).backward()
    assert weight.grad is not None and torch.count_nonzero(weight.grad) == 0


def test_gradcheck() -> None:
    logits = sample_logits(3, 11, torch.float64).requires_grad_()
    targets = sample_targets(3, 11)
    min_logit = logits.detach().median(-1).values - 1e-3
    heat = torch.tensor([0.7, 1.0, 1.9])

    def through_logits(values: torch.Tensor) -> Any:
        return token_logprob(values, targets, temperature=heat, min_logit=min_logit, inplace_backward=False)

    torch.autograd.gradcheck(through_logits, (logits,))
    hidden, weight, targets = head_case(3, 4, 11, torch.float64)

    def through_head(states: torch.Tensor, matrix: torch.Tensor) -> Any:
        return linear_token_logprob(states, matrix, targets, temperature=heat, max_extra_bytes=64)

    torch.autograd.gradcheck(through_head, (hidden.requires_grad_(), weight.requires_grad_()))


def test_opcheck() -> None:
    logits = sample_logits(3, 50, torch.float32).requires_grad_()
    targets = sample_targets(3, 50)
    heat = torch.ones(1)
    torch.library.opcheck(
        torch.ops.megarl.token_logprob.default, (logits, targets, heat, 0, None, None, False)
    )
    stats = torch.ops.megarl.token_logprob(logits.detach(), targets, heat, 0, None, None, False)
    torch.library.opcheck(
        torch.ops.megarl.token_logprob_backward_.default,
        (logits.detach().clone(), targets, heat, 0, None, None, stats[:, 0], torch.ones_like(stats)),
    )
    hidden, weight, targets = head_case(5, 4, 50, torch.float32)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), targets, heat, 0, None, 400)
    torch.library.opcheck(torch.ops.megarl.linear_token_logprob.default, arguments)


def test_runs_are_bitwise_equal_whatever_the_number_of_threads() -> None:
    logits = sample_logits(64, 5003, torch.float32)
    targets = sample_targets(64, 5003)
    threads = torch.get_num_threads()
    results: list[list[torch.Tensor]] = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        leaf = logits.clone().requires_grad_()
        result = token_logprob(leaf, targets, inplace_backward=False)
        weigh(*result).backward()
        assert leaf.grad is not None
        results.append([*(value.detach() for value in result), leaf.grad])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_check_numerics_names_the_row(poison: float) -> None:
    logits = sample_logits(6, 2000, torch.float32)
    logits[4, 1234] = poison
    targets = sample_targets(6, 2000)
    assert not torch.isfinite(token_logprob(logits, targets).logprob[4])
    with pytest.raises(FloatingPointError, match="megarl::token_logprob: logprob of row 4"):
        token_logprob(logits, targets, check_numerics=True)
    with pytest.raises(FloatingPointError, match="row 4"):
        token_logprob(logits, targets[:2], row_index=torch.tensor([1, 4]), check_numerics=True)


LOGITS = torch.zeros(3, 10)
TARGETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 10, 2])}, r"token_logprob: targets\[1\] = 10 is outside .* \[0, 10\)"),
        ({"targets": torch.tensor([0, 1, -1])}, r"token_logprob: targets\[2\] = -1"),
        ({"targets": TARGETS[:2]}, r"token_logprob: targets must have shape \[3\], got \[2\]"),
        ({"targets": TARGETS.float()}, r"token_logprob: targets must be Long, got Float"),
        ({"logits": LOGITS[0]}, r"token_logprob: logits must have shape \[T, V\], got \[10\]"),
        ({"logits": LOGITS.int()}, r"token_logprob: logits must be float32.*got Int"),
        ({"logits": torch.zeros(10, 3).T}, r"token_logprob: logits must be contiguous along the vocab"),
        ({"temperature": 0.0}, r"token_logprob: temperature\[0\] must be positive and finite, got 0"),
        ({"temperature": torch.ones(2)}, r"token_logprob: temperature must have shape \[3\], got \[2\]"),
        ({"row_index": torch.tensor([0, 3, 1])}, r"token_logprob: row_index\[1\] = 3 is outside the 3 rows"),
        ({"row_index": torch.tensor([0, 1, 1])}, r"token_logprob: row_index\[2\] = 1 appears twice"),
        ({"min_logit": torch.zeros(3).double()}, r"token_logprob: min_logit must be Float, got Double"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "targets": TARGETS, **change}
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(10, 5)},
            r"linear_token_logprob: weight must have shape \[V, 4\], got \[10, 5\]",
        ),
        (
            {"weight": torch.zeros(10, 4).bfloat16()},
            r"linear_token_logprob: weight is BFloat16, hidden Float",
        ),
        ({"targets": torch.tensor([0, 1, 10])}, r"linear_token_logprob: targets\[2\] = 10 is outside"),
        ({"max_extra_bytes": 0}, r"linear_token_logprob: max_extra_bytes must be positive, got 0"),
    ],
)
def test_wrong_arguments_of_linear_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(10, 4), "targets": TARGETS, **change}
    with pytest.raises(ValueError, match=message):
        linear_token_logprob(**arguments)
