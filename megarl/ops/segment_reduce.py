"""Sum or mean of per-token values over each sequence of a packed batch, differentiable."""

from __future__ import annotations

from typing import Any, Literal

import torch

from megarl.ops._load import load_native

load_native()


def segment_reduce(
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> torch.Tensor:
    """Return ``out[s] = sum of values[t] over cu_seqlens[s] <= t < cu_seqlens[s + 1] where mask[t] != 0``.

    values [T] (fp32, bf16, fp16, fp64), cu_seqlens [S + 1] int32 from 0 to T, mask [T] float32; returns [S]
    in the dtype of values, summed in float64 in a fixed order. A mean divides by the number of values with
    mask, and is 0 over none. Values without mask are not read, so they may be NaN. The gradient goes to
    values.

    In a context-parallel slice pass ``cu_seqlens // size``, and add the ranks' sums (not their means).

    Raises:
        ValueError: wrong shapes, dtypes or boundaries.
    """
    reduced: torch.Tensor = torch.ops.megarl.segment_reduce(values, cu_seqlens, mask, reduction == "mean")
    return reduced


@torch.library.register_fake("megarl::segment_reduce")
def _(values: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None, mean: bool) -> torch.Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.register_fake("megarl::segment_reduce_backward")
def _(
    grad: torch.Tensor, cu_seqlens: torch.Tensor, mask: torch.Tensor | None, num_values: int, mean: bool
) -> torch.Tensor:
    return grad.new_empty(num_values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, cu_seqlens, mask, mean = inputs
    ctx.save_for_backward(cu_seqlens, mask)
    ctx.num_values, ctx.mean = values.shape[0], mean


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    cu_seqlens, mask = ctx.saved_tensors
    grad_values = torch.ops.megarl.segment_reduce_backward(grad, cu_seqlens, mask, ctx.num_values, ctx.mean)
    return grad_values, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cu_seqlens, mask, _, mean = inputs
    ctx.save_for_backward(cu_seqlens, mask)
    ctx.mean = mean


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    # The reduction is linear: the gradient of its gradient is the reduction itself.
    cu_seqlens, mask = ctx.saved_tensors
    reduced = torch.ops.megarl.segment_reduce(grad.contiguous(), cu_seqlens, mask, ctx.mean)
    return reduced, None, None, None, None


torch.library.register_autograd("megarl::segment_reduce", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "megarl::segment_reduce_backward", _double_backward, setup_context=_setup_backward_context
)
