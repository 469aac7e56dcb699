"""SwiGLU and RMS norm as single autograd steps, against plain torch and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F


def swiglu_of_torch(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def test_swiglu_is_torchs_bit_for_bit() -> None:
    from megarl.trainer.fused import swiglu

    torch.manual_seed(1)
    x = torch.randn(37, 1, 48)
    grad = torch.randn(37, 1, 24)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    ours, theirs = swiglu(one), swiglu_of_torch(two)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(ours, theirs)
    assert one.grad is not None and two.grad is not None
    assert torch.equal(one.grad, two.grad)
    torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("act", [F.silu, torch.tanh, torch.nn.Identity()])
def test_gated_is_torchs_bit_for_bit(act: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from megarl.trainer.fused import gated

    torch.manual_seed(1)
    gate, up, grad = torch.randn(3, 37, 24).unbind()
    mine, theirs = ([t.clone().requires_grad_() for t in (gate, up)] for _ in range(2))
    ours, expected = gated(act, *mine), act(theirs[0]) * theirs[1]
    ours.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours, expected)
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    from megarl.trainer.fused import rms_norm

    torch.manual_seed(2)
    x, weight = 3 * torch.randn(29, 1, 64), torch.randn(64)
    grad = torch.randn(29, 1, 64)
    exact = [t.double().requires_grad_() for t in (x.to(dtype), weight.to(dtype))]
    F.rms_norm(exact[0], (64,), exact[1], 1e-6).backward(grad.to(dtype).double())
    mine = [t.to(dtype).requires_grad_() for t in (x, weight)]
    out = rms_norm(mine[0], mine[1], 1e-6)
    out.backward(grad.to(dtype))
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for found, reference in zip(mine, exact, strict=True):
        assert found.grad is not None and reference.grad is not None
        assert found.grad.dtype == dtype
        error = (found.grad.double() - reference.grad).abs().max()
        assert error <= bound * reference.grad.abs().max()
    wide = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 8), (8,))]
    torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), tuple(wide))
