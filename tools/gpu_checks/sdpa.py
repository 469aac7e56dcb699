"""Measure torch's attention kernels: the cost of a new length with and without cuDNN, and a mask's memory.

cuDNN builds a plan for every new shape. Packed batches have new lengths all the time, so the cost of the
first call with a length is paid again and again.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from gpu_checks.report import Report

HEADS, KV_HEADS, WIDTH = 32, 8, 128  # of an 8B Llama or Qwen
BACKENDS = ("math", "flash", "efficient", "cudnn", "overrideable")
MOST_SECONDS = 20.0


def run(report: Report) -> None:
    """Measure each part separately; the cuDNN one comes last, since it is slow."""
    lengths = [64 + 8 * n for n in range(4)] if report.quick else [129 + 23 * n for n in range(50)]
    for part in (lambda: masked(report), lambda: packed(report, lengths)):
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            report.problem(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    cost = {}
    for name, cudnn in (("cudnn_off", False), ("cudnn_on", True)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        cost[name] = new_lengths(report, name, lengths)
    report.summary(
        f"a new length costs {cost['cudnn_on']:.1f} ms with cuDNN, {cost['cudnn_off']:.1f} ms without"
    )


def new_lengths(report: Report, name: str, lengths: list[int]) -> float:
    """Return the median extra milliseconds of the first forward and backward with a length."""
    inputs = _inputs(1, lengths[-1] + 64)
    _seconds(lambda: _attend(*inputs))  # loads the libraries
    first, again = [], []
    begin = time.monotonic()
    for length in lengths:
        inputs = _inputs(1, length)
        for times in (first, again):
            times.append(_seconds(lambda: _attend(*inputs)))  # noqa: B023  called at once
        if time.monotonic() - begin > MOST_SECONDS:
            break
    extra = sorted(1e3 * (a - b) for a, b in zip(first, again, strict=True))
    report.figure(f"{name}_backend", _backend(*inputs))
    report.figure(f"{name}_num_lengths", len(first))
    report.figure(f"{name}_first_s", sum(first))
    report.figure(f"{name}_again_s", sum(again))
    report.figure(f"{name}_extra_ms", {"median": extra[len(extra) // 2], "largest": extra[-1]})
    return extra[len(extra) // 2]


def masked(report: Report) -> None:
    """Measure samples with a shared prompt: queries [8, heads, 512, d], 1024 + 512 keys, with a mask."""
    rows, before, length = (2, 32, 32) if report.quick else (8, 1024, 512)
    q, k, v = _inputs(rows, length, before + length)
    mask = torch.ones(length, before + length, dtype=torch.bool, device="cuda").tril(before)
    repeats = HEADS // KV_HEADS

    def repeated() -> torch.Tensor:
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def grouped() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    for name, call in (("masked_gqa", grouped), ("masked_repeated", repeated)):
        for cudnn in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            key = f"{name}_cudnn_{'on' if cudnn else 'off'}"
            try:
                report.figure(key, _cost(call))
            except RuntimeError as error:
                report.figure(key, str(error).splitlines()[0][:200])
            torch.cuda.empty_cache()
    torch.backends.cuda.enable_cudnn_sdp(False)
    report.figure("masked_gqa_backend_cudnn_off", _backend(q, k, v, mask, causal=False))


def _cost(call: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Return time and peak memory of forward and backward, without inputs and their gradients."""
    _seconds(lambda: _backward(call))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _seconds(lambda: _backward(call))
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20, "ms": 1e3 * seconds}


def packed(report: Report, lengths: list[int]) -> None:
    """Measure all sequences in one call of the variable-length kernel; check its mask with fewer queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        report.figure("varlen", "not in this torch")
        return
    known = inspect.signature(varlen_attn).parameters
    report.figure(
        "varlen", [name for name in ("window_size", "is_causal", "scale", "enable_gqa") if name in known]
    )
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True

    def rows(heads: int, count: int) -> torch.Tensor:
        return torch.randn(count, heads, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def bounds(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device="cuda")

    q, k, v = rows(HEADS, sum(lengths)), rows(KV_HEADS, sum(lengths)), rows(KV_HEADS, sum(lengths))
    cu, longest = bounds(lengths), max(lengths)

    def call() -> torch.Tensor:
        return varlen_attn(q, k, v, cu, cu, longest, longest, **causal)

    _seconds(lambda: _backward(call))
    report.figure("varlen_ms", 1e3 * _seconds(lambda: _backward(call)))
    q, k, v = rows(HEADS, 40), rows(KV_HEADS, 100), rows(KV_HEADS, 100)
    out = varlen_attn(q, k, v, bounds([40]), bounds([100]), 40, 100, **causal)
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    wide = [x.detach().double().cpu().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
    mask = torch.ones(40, 100, dtype=torch.bool).tril(60)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in wide[1:])
    expected = F.scaled_dot_product_attention(wide[0], keys, values, attn_mask=mask)
    wanted = [expected, *torch.autograd.grad(expected.sum(), wide)]
    worst = max(
        ((a.double().cpu() - b[0].transpose(0, 1)).abs().max() / b.abs().max()).item()
        for a, b in zip((out, *grads), wanted, strict=True)
    )
    report.figure("varlen_prefix_error", worst)
    report.check(worst < 2e-2, f"varlen with 40 queries on 100 keys is off by {worst:.2g}")


def _inputs(rows: int, queries: int, keys: int | None = None) -> list[torch.Tensor]:
    sizes = ((HEADS, queries), (KV_HEADS, keys or queries), (KV_HEADS, keys or queries))
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(rows, heads, n, WIDTH, **make).requires_grad_() for heads, n in sizes]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    _backward(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def _backward(call: Callable[[], torch.Tensor]) -> None:
    call().sum().backward()


def _seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = True,
) -> str:
    return BACKENDS[torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=True)]
