"""Check context-parallel attention on the GPU's kernels, forward and backward, against float64.

A group of one rank runs the same code: two chunks per sequence, joined by their log-sum-exps. Chunks of 64
and 65 tokens, since the kernel reads the log-sum-exps in rows of 32.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist

from gpu_checks.report import Report

HEADS, KV_HEADS, WIDTH, SCALE = 8, 2, 64, 0.125
# Relative to each tensor's largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(report: Report) -> None:
    """Check every chunk length, dtype and prefix separately: an exception does not hide the others."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    worst: dict[str, float] = {}
    for chunk in (64, 65, 96, 1):
        for dtype in TOLERANCE:
            for prefixed in (False, True):
                name = f"{chunk} {str(dtype).removeprefix('torch.')}{' prefix' if prefixed else ''}"
                try:
                    worst[name] = _error(chunk, dtype, prefixed)
                except Exception as error:
                    report.problem(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    continue
                limit = TOLERANCE[dtype]
                report.check(worst[name] < limit, f"{name}: off by {worst[name]:.2g}, more than {limit}")
    report.figure("relative_error", worst)
    if worst:
        report.summary(f"off by {max(worst.values()):.1g} of the largest value at most")
    dist.destroy_process_group()


def _error(chunk: int, dtype: torch.dtype, prefixed: bool) -> float:
    """Return the largest difference of output and gradients, relative to each one's largest value."""
    from megarl.trainer.megatron.context_attention import context_parallel_attention

    lengths = [2 * chunk, 2 * chunk, 4 * chunk]
    starts = [0, *accumulate(lengths)]
    prefixes = [None, (0, lengths[0]), None] if prefixed else None
    torch.manual_seed(chunk)
    shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, grad = (torch.randn(starts[-1], heads, WIDTH).to(dtype) for heads in shapes)
    mask = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, length in enumerate(lengths):
        own = slice(starts[number], starts[number + 1])
        mask[own, own] = torch.ones(length, length).tril().bool()
        if prefixes and prefixes[number]:
            mask[own, slice(*prefixes[number])] = True
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    heads = [x.repeat_interleave(HEADS // x.shape[1], dim=1).transpose(0, 1) for x in wide]
    scores = (heads[0] @ heads[1].mT * SCALE).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ heads[2]).transpose(0, 1)
    wanted = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    near = [x.cuda().requires_grad_() for x in (q, k, v)]
    out = context_parallel_attention(*near, lengths, prefixes, SCALE, dist.group.WORLD)
    found = [out, *torch.autograd.grad(out, near, grad.cuda())]
    return max(
        ((a.double().cpu() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, wanted, strict=True)
    )
