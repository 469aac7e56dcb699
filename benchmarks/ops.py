"""Compare native ops with peers: ``python -m benchmarks ops --json FILE [--quick] [--peers DIR]``.

Seconds are medians of interleaved calls on the same inputs; peak_extra_bytes is a call's peak allocation
minus what remains after it (benchmarks/common.py). A forward runs without autograd; ours also returns the
entropy, which no peer does except eager's variant in vocab_kl. ``ratios`` take the worse of the cases; speed
is peer / ours, cost is ours / reference.

Peers are looked up among the installed packages and in DIR
(``pip install --no-deps --target DIR trl cut-cross-entropy``); those not found are listed in ``missing``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Implementation, Row, bytes_of, measure, seconds_of
from benchmarks.loss_ops import (
    KL_CASES,
    SAMPLES_CASE,
    TOKENS_CASE,
    kl_case_name,
    policy_loss_rows,
    small_rows,
    vocab_kl_rows,
)
from benchmarks.peers import head_peers, report_missing, token_peers
from megarl.ops import linear_token_logprob, token_logprob

CASES = [(1024, 49_152), (512, 151_936)]
HIDDEN = 576  # SmolLM2-135M: with a short hidden size the cost outside the GEMMs weighs most


def case_name(rows: int, columns: int) -> str:
    """Return the case's name in the JSON file."""
    return f"[{rows}, {columns}] fp32"


def backward_through(function: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return forward plus backward, with a gradient that differs per row."""

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = function(*tensors)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        return torch.autograd.grad(result, leaves, torch.linspace(-1, 1, result.numel()))

    return both


def token_logprob_rows(rows: int, columns: int, repeats: int) -> list[Row]:
    """Measure forward and forward + backward on logits."""
    torch.manual_seed(0)
    logits = torch.randn(rows, columns) * 2
    targets = torch.randint(0, columns, (rows,))
    peers, missing = token_peers()
    report_missing(missing)

    def copied() -> tuple[torch.Tensor, torch.Tensor]:
        # Megatron's forward and our backward overwrite the logits, so each call gets a copy.
        return logits.clone(), targets

    def leaf() -> tuple[torch.Tensor, torch.Tensor]:
        return logits.clone().requires_grad_(), targets

    @torch.no_grad()
    def entropy_too(values: torch.Tensor, chosen: torch.Tensor) -> Any:
        return token_logprob(values, chosen)

    forward = [Implementation("megarl", entropy_too, copied)]
    both = [Implementation("megarl", backward_through(lambda *t: token_logprob(*t).logprob), leaf)]
    for name, peer in peers.items():
        forward.append(Implementation(name, torch.no_grad()(peer), copied))
        both.append(Implementation(name, backward_through(peer), leaf))
    case = case_name(rows, columns)
    return [
        *measure("token_logprob", case, "fwd", forward, repeats),
        *measure("token_logprob", case, "fwdbwd", both, repeats),
    ]


def linear_rows(rows: int, columns: int, repeats: int) -> list[Row]:
    """Measure forward and forward + backward from hidden states, and bare GEMMs: 1 forward, 3 backward."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, HIDDEN)
    weight = torch.randn(columns, HIDDEN) * 0.05
    targets = torch.randint(0, columns, (rows,))
    buffers = (torch.empty(rows, columns), torch.empty_like(hidden), torch.empty_like(weight))
    buffers[0].zero_()  # touched first, so page faults do not count against the GEMMs

    def plain() -> tuple[torch.Tensor, ...]:
        return hidden, weight, targets

    def leaves() -> tuple[torch.Tensor, ...]:
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets

    def one_gemm() -> None:
        torch.mm(hidden, weight.t(), out=buffers[0])

    def four_gemms() -> None:
        one_gemm()
        one_gemm()
        torch.mm(buffers[0], weight, out=buffers[1])
        torch.mm(buffers[0].t(), hidden, out=buffers[2])

    @torch.no_grad()
    def entropy_too(*tensors: torch.Tensor) -> Any:
        return linear_token_logprob(*tensors)

    forward = [Implementation("megarl", entropy_too, plain), Implementation("bare_gemms", one_gemm)]
    both = [
        Implementation("megarl", backward_through(lambda *t: linear_token_logprob(*t).logprob), leaves),
        Implementation("bare_gemms", four_gemms),
    ]
    peers, missing = head_peers()
    report_missing(missing)
    for name, peer in peers.items():
        forward.append(Implementation(name, torch.no_grad()(peer), plain))
        both.append(Implementation(name, backward_through(peer), leaves))
    case = case_name(rows, columns)
    return [
        *measure("linear_token_logprob", case, "fwd", forward, repeats),
        *measure("linear_token_logprob", case, "fwdbwd", both, repeats),
    ]


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return the figures with goals; each is the worse of the cases."""
    speed: dict[str, list[float]] = {}
    cost: dict[str, list[float]] = {}

    def add(table: dict[str, list[float]], name: str, value: float) -> None:
        table.setdefault(name, []).append(value)

    for size in CASES:
        case = case_name(*size)
        forward = seconds_of(rows, "token_logprob", case, "fwd")
        both = seconds_of(rows, "token_logprob", case, "fwdbwd")
        best_peer = min(value for name, value in forward.items() if name != "megarl")
        best_both = min(value for name, value in both.items() if name != "megarl")
        add(speed, "token_logprob_fwd_vs_eager", forward["torch_eager"] / forward["megarl"])
        add(speed, "token_logprob_fwd_vs_best_peer", best_peer / forward["megarl"])
        add(speed, "token_logprob_fwdbwd_vs_eager", both["torch_eager"] / both["megarl"])
        add(speed, "token_logprob_fwdbwd_vs_best_peer", best_both / both["megarl"])
        extra = max(bytes_of(rows, "token_logprob", case, name)["megarl"] for name in ("fwd", "fwdbwd"))
        add(cost, "token_logprob_peak_extra_vs_logits", extra / (4 * size[0] * size[1]))
        for pass_name in ("fwd", "fwdbwd"):
            seconds = seconds_of(rows, "linear_token_logprob", case, pass_name)
            add(cost, f"linear_token_logprob_{pass_name}_vs_gemms", seconds["megarl"] / seconds["bare_gemms"])
            add(
                speed,
                f"linear_token_logprob_{pass_name}_vs_eager",
                seconds["torch_eager"] / seconds["megarl"],
            )
        peak = bytes_of(rows, "linear_token_logprob", case, "fwdbwd")
        add(cost, "linear_token_logprob_peak_vs_eager", peak["megarl"] / peak["torch_eager"])
    others = [
        ("vocab_kl", kl_case_name(*size), pass_name) for size in KL_CASES for pass_name in ("fwd", "fwdbwd")
    ]
    others += [("policy_loss", TOKENS_CASE, "fwdbwd"), ("group_advantage", SAMPLES_CASE, "fwd")]
    others += [("segment_reduce", TOKENS_CASE, "fwd"), ("gae", TOKENS_CASE, "fwd")]
    for op, case, pass_name in others:
        seconds = seconds_of(rows, op, case, pass_name)
        for peer in sorted(seconds.keys() - {"megarl"}):
            name = f"{op}_{pass_name}_vs_{peer.removeprefix('torch_')}"
            add(speed, name, seconds[peer] / seconds["megarl"])
    return {name: min(values) for name, values in speed.items()} | {
        name: max(values) for name, values in cost.items()
    }


def main(arguments: list[str]) -> None:
    """Run the cases and write {"rows": [...], "ratios": {...}, "missing": [...]}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: under 4 minutes")
    parser.add_argument("--peers", type=Path, help="directory with packages of peers")
    options = parser.parse_args(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    repeats, head_repeats = (3, 2) if options.quick else (9, 5)
    rows: list[Row] = []
    for size in CASES:
        rows += token_logprob_rows(*size, repeats)
        rows += linear_rows(*size, head_repeats)
    for size in KL_CASES:
        rows += vocab_kl_rows(*size, repeats)
    rows += policy_loss_rows(5 * repeats) + small_rows(repeats)
    result = {"rows": rows, "ratios": ratios(rows), "missing": token_peers()[1] + head_peers()[1]}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result["ratios"].items():  # type: ignore[attr-defined]
        print(f"{name:40} {value:8.3f}")
