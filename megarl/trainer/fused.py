"""Elementwise parts of a layer as single autograd steps that keep their input and recompute the rest.

As separate torch operations, SwiGLU keeps five tensors of the MLP's width for the backward pass and the norm
two of the hidden size. Here SwiGLU keeps its input and the norm its input and one number per token: a third
less for a layer, in fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        [x] = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(grad, F.silu(gate), out=grad_up)
        return grad_x


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """gate | up [..., 2 * I] -> silu(gate) * up [..., I]."""
    out = _SwiGlu.apply(x)
    assert isinstance(out, torch.Tensor)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, act: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        active = act(gate)
        return active * up if active is gate else active.mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        [grad_gate] = torch.autograd.grad(active, gate, grad * up)
        return None, grad_gate, grad * active.detach()


def gated(act: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up of equal shapes [..., I], with an elementwise ``act``."""
    out = _Gated.apply(act, gate, up)
    assert isinstance(out, torch.Tensor)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = x.to(scale.dtype) * scale, grad.to(scale.dtype)
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0)
        # x / |x| changes orthogonally to x: the gradient's component along x is removed.
        along = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(unit.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467), in fp32 inside.

    On other devices than a CPU, torch's fused kernel is used.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    out = _RmsNorm.apply(x, weight, eps)
    assert isinstance(out, torch.Tensor)
    return out
