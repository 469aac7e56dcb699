"""Exchanges of activations between tensor ranks, each with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 has new names for them.
_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_single: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def copy_to_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``x``, which all ranks have; each uses it for its own part, so that gradients are summed."""
    out: torch.Tensor = _Copy.apply(x, group)
    return out


def gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup, *, partial: bool) -> torch.Tensor:
    """All ranks' equal parts along ``dim``. With ``partial`` each uses the whole for its own part.

    The gradient of a rank's part is then the sum of what all ranks say of it; else all say the same.
    """
    out: torch.Tensor = _Gather.apply(x, dim, group, partial)
    return out


def scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup, *, partial: bool) -> torch.Tensor:
    """This rank's part along ``dim``, of the ranks' sum with ``partial``, else of what all have alike."""
    out: torch.Tensor = _Scatter.apply(x, dim, group, partial)
    return out


def _all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty((group.size() * first.shape[0], *first.shape[1:]))
    _gather_single(out, first, group=group)
    return out.movedim(0, dim)


def _own_part(x: torch.Tensor, dim: int, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
    if not partial:
        return x.chunk(group.size(), dim)[group.rank()].contiguous()
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty((first.shape[0] // group.size(), *first.shape[1:]))
    _scatter_single(out, first, group=group)
    return out.movedim(0, dim).contiguous()


def _summed(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.options = dim, group, partial
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _own_part(grad, *ctx.options), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.options = dim, group
        return _own_part(x, dim, group, partial)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_gather(grad, *ctx.options), None, None, None
