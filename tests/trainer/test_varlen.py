"""Packed attention by one variable-length call, against one softmax over a full mask.

The kernel needs a GPU. Elsewhere stands dense attention that takes the same arguments and aligns its causal
mask to the ends of queries and keys, as the kernel's documentation has it; tests marked gpu run the kernel.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

LENGTHS = [13, 4, 21, 1, 9]
PREFIXES = [None, (0, 11), None, (17, 38), (0, 13)]


def tensors(dtype: torch.dtype, device: str, width: int = 16) -> list[torch.Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient."""
    torch.manual_seed(1)
    return [torch.randn(sum(LENGTHS), heads, width, dtype=dtype, device=device) for heads in (4, 2, 2, 4)]


def dense(inputs: list[torch.Tensor], prefixes: list[Any] | None) -> list[torch.Tensor]:
    """Output and gradients in float64."""
    q, k, v, grad = (x.detach().double().cpu() for x in inputs)
    starts = [0, *accumulate(LENGTHS)]
    mask = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, (start, stop) in enumerate(pairwise(starts)):
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        if prefixes and prefixes[number]:
            mask[start:stop, slice(*prefixes[number])] = True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    heads = [x.repeat_interleave(4 // x.shape[1], dim=1).transpose(0, 1) for x in leaves]
    scores = (heads[0] @ heads[1].mT * 0.3).masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1) @ heads[2]).transpose(0, 1)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def packed(inputs: list[torch.Tensor], prefixes: list[Any] | None) -> list[torch.Tensor]:
    """The same by MegaRL's attention."""
    from megarl.trainer.packed_attention import PackedRow, packed_causal_attention

    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    microbatch = PackedRow(lengths=LENGTHS, prefixes=prefixes)
    out = packed_causal_attention(*leaves, microbatch, 0.3)
    out.backward(inputs[3])
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def stand_in(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn, sequence by sequence."""
    assert window_size == (-1, 0) and enable_gqa
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        mask = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool()
        keys, values = (x.repeat_interleave(2, dim=0) for x in (keys, values))
        out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], mask, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("prefixes", [None, PREFIXES])
def test_sequences_and_prefixes_lie_where_the_call_says(prefixes: list[Any] | None) -> None:
    inputs = tensors(torch.float64, "cpu")
    with (
        patch("megarl.trainer.packed_attention.takes", lambda q: True),
        patch("torch.nn.attention.varlen.varlen_attn", stand_in),
    ):
        found = packed(inputs, prefixes)
    for value, expected in zip(found, dense(inputs, prefixes), strict=True):
        assert (value - expected).abs().max() < 1e-12


def test_the_kernel_is_asked_for_what_it_takes() -> None:
    from megarl.trainer.varlen import takes

    def head(width: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
        return type("Heads", (), {"device": torch.device(device), "dtype": dtype, "shape": (5, 4, width)})()

    for capability, taken in (((9, 0), (64, 192, 256)), ((8, 9), (64, 192)), ((7, 5), ())):
        with patch("torch.cuda.get_device_capability", lambda _, found=capability: found):
            assert tuple(w for w in (20, 64, 192, 256, 264) if takes(head(w))) == taken
            assert not takes(head(64, torch.float32)) and not takes(head(64, device="cpu"))


def test_an_older_torch_is_not_told_of_fewer_heads() -> None:
    """In torch 2.11 the kernel takes them too, and its Python face has no word for it."""
    from megarl.trainer import varlen

    def older(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        assert scale is not None
        bounds = (cu_q, cu_k, max_q, max_k)
        return stand_in(q, k, v, *bounds, scale=scale, window_size=window_size, enable_gqa=True)

    inputs = tensors(torch.float64, "cpu")
    varlen._parameters.cache_clear()
    try:
        with (
            patch("megarl.trainer.packed_attention.takes", lambda q: True),
            patch("torch.nn.attention.varlen.varlen_attn", older),
        ):
            found = packed(inputs, PREFIXES)
    finally:
        varlen._parameters.cache_clear()
    for value, expected in zip(found, dense(inputs, PREFIXES), strict=True):
        assert (value - expected).abs().max() < 1e-12


def test_elsewhere_keys_are_as_many_as_queries() -> None:
    """Only the CPU's kernel takes fewer of them together with a mask or float32."""
    from megarl.trainer.packed_attention import PackedRow, packed_causal_attention

    seen: list[tuple[int, int, Any]] = []

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return torch.empty_like(q)

    q, k, v, _ = (x.to("meta") for x in tensors(torch.float32, "cpu"))
    microbatch = PackedRow(lengths=LENGTHS, prefixes=PREFIXES)
    with patch("torch.nn.functional.scaled_dot_product_attention", watch):
        out = packed_causal_attention(q, k, v, microbatch, 0.3)
    assert out.shape == q.shape and set(seen) == {(4, 4, False)}


@pytest.mark.gpu
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float32, 1e-4)])
def test_on_a_gpu(prefixes: list[Any] | None, dtype: torch.dtype, tolerance: float) -> None:
    """Fused kernels alone, in bfloat16 by one call and in float32 by buckets."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megarl.trainer.varlen import takes

    inputs = tensors(dtype, "cuda", width=64)
    assert takes(inputs[0]) == (dtype == torch.bfloat16)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        found = packed(inputs, prefixes)
    for value, expected in zip(found, dense(inputs, prefixes), strict=True):
        assert (value.double().cpu() - expected).abs().max() < tolerance * expected.abs().max()
