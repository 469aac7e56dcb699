"""segment_reduce against a float64 loop, gradcheck, and edge cases."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from megarl.ops.segment_reduce import segment_reduce


def ragged(rng: random.Random, sizes: list[int]) -> torch.Tensor:
    return torch.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)], dtype=torch.int32)


def by_loop(
    values: torch.Tensor, cu: torch.Tensor, mask: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    sums = []
    for start, end in pairwise(cu.tolist()):
        kept = [float(values[t]) for t in range(start, end) if mask is None or mask[t] != 0]
        total = sum(kept)
        sums.append(total / len(kept) if reduction == "mean" and kept else total)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
def test_equals_a_float64_loop(reduction: str, dtype: torch.dtype, tolerance: float) -> None:
    rng = random.Random(1)
    for _ in range(20):
        cu = ragged(rng, [rng.choice([0, 1, 2, 7, 8, 9, 63, 500]) for _ in range(rng.randint(0, 9))])
        values = torch.randn(int(cu[-1])).to(dtype)
        for mask in (None, torch.randint(0, 2, values.shape).float()):
            found = segment_reduce(values, cu, mask=mask, reduction=reduction)  # type: ignore[arg-type]
            assert found.dtype == dtype
            expected = by_loop(values, cu, mask, reduction)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_values_without_mask_are_not_read() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), 2.0], requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    cu = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    found = segment_reduce(values, cu, mask=mask, reduction="mean")
    assert found.tolist() == [1.0, 0.0, 2.0]
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert gradient.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_to_second_order(reduction: str) -> None:
    cu = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1]).float()
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for given in (None, mask):
        arguments = {"mask": given, "reduction": reduction}
        assert torch.autograd.gradcheck(lambda v, a=arguments: segment_reduce(v, cu, **a), values)
        assert torch.autograd.gradgradcheck(lambda v, a=arguments: segment_reduce(v, cu, **a), values)


def test_repeats_and_thread_counts_give_the_same_bits() -> None:
    rng = random.Random(2)
    cu = ragged(rng, [rng.randint(0, 5000) for _ in range(60)])
    values = torch.randn(int(cu[-1])) * 1e3
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(segment_reduce(values, cu, reduction="mean"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_wrong_arguments_are_named() -> None:
    values, cu = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="segment_reduce: cu_seqlens must run from 0 to 4, found 0 to 3"):
        segment_reduce(values, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] = 1 falls below 3"):
        segment_reduce(values, torch.tensor([0, 3, 1, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must be Int, got Long"):
        segment_reduce(values, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"mask must have shape \[4\], got \[3\]"):
        segment_reduce(values, cu, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"values must be contiguous \[T\], got \[2, 2\]"):
        segment_reduce(values.view(2, 2), cu)


def test_opcheck() -> None:
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    values = torch.randn(8, requires_grad=True)
    mask = torch.randint(0, 2, (8,)).float()
    torch.library.opcheck(torch.ops.megarl.segment_reduce.default, (values, cu, mask, True))
    torch.library.opcheck(torch.ops.megarl.segment_reduce.default, (values, cu, None, False))
    grad = torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.megarl.segment_reduce_backward.default, (grad, cu, mask, 8, True))
