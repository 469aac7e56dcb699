"""Compare every native op with its floor: the bytes it must move, or its FLOPs (docs/kernels.md)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_checks.report import Report
from gpu_checks.timing import copy_bandwidth, device_seconds, gemm_rate, graph_seconds

GOAL = 0.9
# Bytes and bf16 FLOP per second, from NVIDIA's data sheets; the first name contained in the GPU's.
CARDS = {
    "H200": (4.8e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
    "B200": (8.0e12, 2250e12),
}


@dataclass(frozen=True)
class Case:
    """One call, with the minimum it moves (bytes) and computes (FLOPs). Launch-bound calls have no goal."""

    name: str
    call: Callable[[], Any]
    num_bytes: float = 0.0
    flops: float = 0.0
    launch_bound: bool = False


def run(report: Report) -> None:
    """Measure the ceilings, then each op; the slow ones first."""
    copy, gemm = copy_bandwidth(report.quick), gemm_rate(report.quick)
    card = torch.cuda.get_device_name()
    sheet = next((rates for name, rates in CARDS.items() if name in card), (copy, gemm))
    report.figure("copy_tb_per_s", copy / 1e12)
    report.figure("gemm_tflop_per_s", gemm / 1e12)
    report.figure("data_sheet", {"tb_per_s": sheet[0] / 1e12, "tflop_per_s": sheet[1] / 1e12})
    agrees(report)
    below = []
    for cases in (row_cases, head_cases, token_cases):
        try:
            for case in cases(report.quick):
                share = measure(report, case, sheet, (copy, gemm))
                if not case.launch_bound and share < GOAL:
                    below.append(f"{case.name} {share:.0%}")
        except Exception as error:
            traceback.print_exc()
            report.problem(f"{cases.__name__}: {type(error).__name__}: {str(error)[:200]}")
        torch.cuda.empty_cache()
    report.figure("below_goal", below)
    report.summary(
        f"copy {copy / 1e12:.2f} TB/s; {len(below)} of the large cases below {GOAL:.0%} of the floor"
    )


def measure(report: Report, case: Case, sheet: tuple[float, float], ceilings: tuple[float, float]) -> float:
    """Return the case's share of the data sheet's floor."""
    seconds = (graph_seconds(case.call) if case.launch_bound else None) or device_seconds(case.call)
    floor = max(case.num_bytes / sheet[0], case.flops / sheet[1])
    reachable = max(case.num_bytes / ceilings[0], case.flops / ceilings[1])
    figures = {"us": 1e6 * seconds, "floor_us": 1e6 * floor, "of_floor": floor / seconds}
    figures["of_measured_ceiling"] = reachable / seconds
    if case.launch_bound:  # as the trainer calls it: including the host
        figures["us_called_from_python"] = 1e6 * device_seconds(case.call, calls=20)
    report.figure(case.name, figures)
    return floor / seconds


def agrees(report: Report) -> None:
    """Compare a few rows of the largest case with float64: the timed result must be correct."""
    from megarl.ops import token_logprob

    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 151_936, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(151_936, (64,), device="cuda")
    with torch.no_grad():
        found = token_logprob(logits, targets).logprob
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    error = (found.double() - expected).abs().max().item()
    report.figure("token_logprob_error", error)
    report.check(error < 1e-4, f"token_logprob is off by {error:.2g}")


def row_cases(quick: bool) -> Iterator[Case]:
    """Yield kernels over the vocabulary: T rows of V columns in bf16."""
    ops = torch.ops.megarl
    heat = torch.ones(1, device="cuda")
    sizes = [(64, 1003)] if quick else [(8192, 151_936), (8192, 32_000), (512, 151_936)]
    for number, (rows, columns) in enumerate(sizes):
        size = f"[{rows}, {columns}]"
        logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(columns, (rows,), device="cuda")
        once = 2.0 * rows * columns
        forward = (logits, targets, heat, 0, None, None)
        stats = ops.token_logprob(*forward, False)
        grads = torch.randn_like(stats) / rows
        yield Case(f"token_logprob {size}", lambda: ops.token_logprob(*forward, False), once + 16 * rows)  # noqa: B023
        backward = (*forward, stats[:, 0].contiguous(), grads)
        yield Case(f"token_logprob_backward {size}", lambda: ops.token_logprob_backward_(*backward), 2 * once)  # noqa: B023
        if number:
            continue
        pair = (logits.normal_(), torch.randn_like(logits), heat)  # logits were overwritten by the backward
        yield Case(f"vocab_kl {size}", lambda: ops.vocab_kl(*pair, False), 2 * once + 24 * rows)  # noqa: B023
        stats = ops.vocab_kl(*pair, False)
        kl = (*pair, stats[:, [0, 2]].contiguous(), torch.randn_like(stats) / rows)
        yield Case(f"vocab_kl_backward {size}", lambda: ops.vocab_kl_backward_(*kl), 3 * once)  # noqa: B023
        lses = [x.float().logsumexp(-1) for x in pair[:2]]
        js = (*pair, *lses, 0.5)
        yield Case(f"vocab_js {size}", lambda: ops.vocab_js(*js), 2 * once + 8 * rows)  # noqa: B023
        of_rows = (torch.rand(rows, device="cuda"), torch.randn(rows, device="cuda") / rows)
        yield Case(f"vocab_js_backward {size}", lambda: ops.vocab_js_backward_(*js, *of_rows), 3 * once)  # noqa: B023


def head_cases(quick: bool) -> Iterator[Case]:
    """Yield linear_token_logprob with several budgets, and the bare matrix product."""
    from megarl.ops import linear_token_logprob

    rows, width, columns = (64, 64, 1003) if quick else (8192, 4096, 131_072)
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(columns, width, device="cuda", dtype=torch.bfloat16) / width**0.5).requires_grad_()
    targets = torch.randint(columns, (rows,), device="cuda")
    flops = 2.0 * rows * width * columns
    few = hidden.detach()[: max(1, rows // 8)]
    yield Case("bare head product, an eighth of the rows", lambda: few @ weight.detach().T, flops=flops / 8)
    for budget in (32, 64, 256):
        extra = budget * 2**20

        def forward() -> Any:
            with torch.no_grad():
                return linear_token_logprob(hidden, weight, targets, max_extra_bytes=extra)  # noqa: B023

        def both() -> Any:
            out = linear_token_logprob(hidden, weight, targets, max_extra_bytes=extra)  # noqa: B023
            return torch.autograd.grad(out.logprob.sum(), [hidden, weight])

        yield Case(f"linear_token_logprob {budget} MiB", forward, flops=flops)
        yield Case(f"linear_token_logprob and backward {budget} MiB", both, flops=4 * flops)


def token_cases(quick: bool) -> Iterator[Case]:
    """Yield kernels over tokens: one microbatch (launch-bound) and a million tokens (bandwidth-bound)."""
    for tokens in (1024,) if quick else (65_536, 2**20):
        yield from _packing(tokens)
        yield from _losses(tokens)


def _bounds(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cu_seqlens [257] int32, and the sequence of each token."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(tokens - 1, generator=generator)[:255].sort().values + 1
    cu = torch.cat([torch.zeros(1), cuts, torch.full((1,), tokens)]).int()
    ids = torch.repeat_interleave(torch.arange(256), cu.diff())
    return cu.cuda(), ids.cuda()


def _packing(tokens: int) -> Iterator[Case]:
    ops, (cu, _) = torch.ops.megarl, _bounds(tokens)
    small = tokens < 2**20
    starts, lengths = cu[:-1].long(), cu.diff()
    order = torch.randperm(256, device="cuda")  # packed in another order
    cu_out = torch.cat([cu[:1], lengths[order].cumsum(0)]).int()
    of = {
        "token_ids": torch.randint(150_000, (tokens,), device="cuda"),
        "loss_mask": torch.ones(tokens, device="cuda", dtype=torch.uint8),
        "rollout_logprobs": torch.randn(tokens, device="cuda"),
        "starts": starts[order],
        "lengths": lengths[order],
        "rows": order,
        "advantages": torch.randn(256, device="cuda"),
        "cu_seqlens": cu_out,
    }
    sizes = {"num_tokens": tokens, "cp_rank": 0, "cp_size": 1}
    yield Case(f"pack_sequences {tokens}", lambda: ops.pack_sequences(**of, **sizes), 57.0 * tokens, 0, small)
    values = torch.randn(tokens, device="cuda")
    back = (values, cu_out, lengths[order], cu_out[:-1].long(), tokens)
    yield Case(f"unpack_values {tokens}", lambda: ops.unpack_values(*back), 8.0 * tokens, 0, small)


def _losses(tokens: int) -> Iterator[Case]:
    from megarl.ops import PolicyLossOptions, policy_loss

    ops, (cu, ids) = torch.ops.megarl, _bounds(tokens)
    small = tokens < 2**20
    old, advantages, ref, rollout = (torch.randn(tokens, device="cuda") / 4 for _ in range(4))
    logprobs, entropy = ((old + 0.01 * ref).requires_grad_() for _ in range(2))
    weights = torch.rand(tokens, device="cuda") / tokens
    options = PolicyLossOptions(correction="tis", kl="k3", kl_coef=0.01, entropy_coef=0.001)
    rest = {"options": options, "entropy": entropy, "ref_logprobs": ref, "rollout_logprobs": rollout}

    def forward() -> Any:
        with torch.no_grad():
            return policy_loss(logprobs, old, advantages, weights, **rest)

    def both() -> Any:
        loss = policy_loss(logprobs, old, advantages, weights, **rest).loss
        return torch.autograd.grad(loss, [logprobs, entropy])

    yield Case(f"policy_loss {tokens}", forward, 28.0 * tokens, 0, small)
    yield Case(f"policy_loss and backward {tokens}", both, (28.0 + 28.0 + 8.0) * tokens, 0, small)
    sums = (old, advantages, rollout, weights, ids, 256)
    yield Case(
        f"policy_sequence_sums {tokens}", lambda: ops.policy_sequence_sums(*sums), 24.0 * tokens, 0, True
    )
    mask = torch.ones(tokens, device="cuda")
    yield Case(
        f"segment_reduce {tokens}", lambda: ops.segment_reduce(old, cu, mask, True), 8.0 * tokens, 0, True
    )
