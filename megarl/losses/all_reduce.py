"""Differentiable sums over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce_sum(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of every rank's ``values``; its gradient is the sum of every rank's gradients.

    For ranks that all compute the same loss from the sum and each count a share of it.
    """
    total: torch.Tensor = _SumOverRanks.apply(values, group)
    return total


def sum_of_parts(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of every rank's ``values``, for equal computations on all ranks: gradient 1 to each."""
    total: torch.Tensor = _SumOfParts.apply(values, group)
    return total


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
