"""Cases of test_kernels.py: MegaRL's ops by their own kernels on the fake device, against the CPU's ops."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import case, main

import megarl.ops  # noqa: F401  # loads megarl._C

ops = torch.ops.megarl
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the CPU and the device may differ by, relative to the largest value: both accumulate in float (float64
# in double) and round once to the result's type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}
# Statistics of half-precision logits are float.
STATISTICS = 2e-6
POLICY_LOSSES = [
    ("clip", "token"),
    ("clip", "sequence"),
    *((objective, "token") for objective in ("cispo", "sapo", "dppo", "vespo")),
]


def on_device(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def difference(of_device: torch.Tensor, of_cpu: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinities and NaNs must agree."""
    a, b = of_device.cpu().double(), of_cpu.double()
    assert a.shape == b.shape and of_device.dtype == of_cpu.dtype
    if a.numel() == 0:
        return 0.0
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(nan=9.0), b[~finite].nan_to_num(nan=9.0)):
        return float("inf")
    a, b = a[finite], b[finite]
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0


class Comparison:
    """Differences by what was compared, over the tolerance of its type."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self.count = 0

    def run(
        self,
        name: str,
        op: Callable[..., Any],
        *arguments: Any,
        tolerance: float | None = None,
        writes: int | None = None,
    ) -> Any:
        """Calls the op on the device and on the CPU and compares results, or the argument it writes to."""
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        device_arguments = [on_device(a) for a in copies]
        of_device, of_cpu = op(*device_arguments), op(*copies)
        if writes is not None:
            of_device, of_cpu = device_arguments[writes], copies[writes]
        pairs = zip(*[r if isinstance(r, tuple | list) else (r,) for r in (of_device, of_cpu)], strict=True)
        for a, b in pairs:
            allowed = tolerance if tolerance is not None else TOLERANCE.get(b.dtype, 0.0)
            error = difference(a, b)
            self.count += 1
            if not error <= allowed:
                self.worst[name] = max(error, self.worst.get(name, 0.0))
        return of_cpu

    def result(self) -> Any:
        return {"compared": self.count, "wrong": self.worst}


def rows(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Row counts and widths: one split and several, widths that are no multiple of a vector."""
    yield from [(3, 37), (40, 515), (2, 20_001 if dtype == torch.float32 else 4099)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@case
def token_logprob() -> Any:
    c, random = Comparison(), generator()
    for dtype in FLOATING:
        tolerance = 1e-13 if dtype == torch.float64 else STATISTICS
        for count, width in rows(dtype):
            logits = (torch.randn(count, width, generator=random, dtype=torch.float64) * 3).to(dtype)
            targets = torch.randint(width, (count,), generator=random)
            temperatures = torch.rand(count, generator=random) + 0.5
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            minimum = torch.full((count,), -2.0, dtype=wide)
            for masked in (None, minimum):
                common = (targets, temperatures, 0, None, masked)
                name = f"{dtype} {count}x{width} {'masked' if masked is not None else ''}"
                stats = c.run(name, ops.token_logprob, logits, *common, False, tolerance=tolerance)
                gradient = torch.randn(stats.shape, generator=random, dtype=torch.float64).to(wide)
                c.run(
                    f"backward {name}",
                    ops.token_logprob_backward_,
                    logits,
                    *common,
                    stats[:, 0].contiguous(),
                    gradient,
                    writes=0,
                )
        index = torch.tensor([2, 0, 1])
        logits = torch.randn(3, 37, generator=random).to(dtype)
        c.run(
            f"{dtype} rows by index",
            ops.token_logprob,
            logits,
            torch.tensor([1, 2, 40]),
            torch.ones(1),
            2,
            index,
            None,
            False,
            tolerance=tolerance,
        )
    return c.result()


@case
def linear_token_logprob() -> Any:
    c, random = Comparison(), generator()
    for dtype in (torch.float32, torch.float64):
        tolerance = 1e-12 if dtype == torch.float64 else STATISTICS
        hidden, weight = (torch.randn(n, 24, generator=random).to(dtype) for n in (30, 515))
        targets = torch.randint(515, (30,), generator=random)
        common = (hidden, weight, targets, torch.ones(1), 0, None)
        budget = 1 << 14  # bytes: several blocks of rows
        stats = c.run(f"{dtype}", ops.linear_token_logprob, *common, budget, tolerance=tolerance)
        gradient = torch.randn(stats.shape, generator=random).to(dtype)
        c.run(
            f"backward {dtype}",
            ops.linear_token_logprob_backward,
            *common,
            stats[:, 0].contiguous(),
            gradient,
            budget,
            True,
            True,
            tolerance=tolerance,
        )
    return c.result()


@case
def vocab_kl() -> Any:
    c, random = Comparison(), generator()
    for dtype in FLOATING:
        tolerance = 1e-12 if dtype == torch.float64 else STATISTICS
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for count, width in rows(dtype):
            student, teacher = (
                (torch.randn(count, width, generator=random, dtype=torch.float64) * 2).to(dtype)
                for _ in range(2)
            )
            temperature = torch.rand(count, generator=random) + 0.5
            name = f"{dtype} {count}x{width}"
            stats = c.run(name, ops.vocab_kl, student, teacher, temperature, False, tolerance=tolerance)
            gradient = torch.randn(stats.shape, generator=random, dtype=torch.float64).to(wide)
            maxima = torch.stack([x.to(wide).amax(1) for x in (student, teacher)], 1)
            c.run(
                f"backward {name}",
                ops.vocab_kl_backward_,
                student,
                teacher,
                temperature,
                maxima,
                gradient,
                writes=0,
            )
            lse = [(x.to(wide) / temperature[:, None].to(wide)).logsumexp(1) for x in (student, teacher)]
            sums = c.run(
                f"js {name}", ops.vocab_js, student, teacher, temperature, *lse, 0.3, tolerance=tolerance
            )
            upstream = torch.randn(count, generator=random, dtype=torch.float64).to(wide)
            c.run(
                f"js backward {name}",
                ops.vocab_js_backward_,
                student,
                teacher,
                temperature,
                *lse,
                0.3,
                sums[:, 0].contiguous(),
                upstream,
                writes=0,
                # A difference of two nearly equal terms.
                tolerance=5e-6 if dtype == torch.float32 else None,
            )
    return c.result()


@case
def segments() -> Any:
    c, random = Comparison(), generator()
    bounds = torch.tensor([0, 5, 5, 1200, 2000], dtype=torch.int32)
    mask = (torch.rand(2000, generator=random) < 0.7).float()
    for dtype in FLOATING:
        values = torch.randn(2000, generator=random).to(dtype)
        for mean in (False, True):
            for kept in (None, mask):
                reduced = c.run(f"reduce {dtype} {mean}", ops.segment_reduce, values, bounds, kept, mean)
                upstream = torch.randn(reduced.shape, generator=random).to(dtype)
                c.run(
                    f"reduce backward {dtype} {mean}",
                    ops.segment_reduce_backward,
                    upstream,
                    bounds,
                    kept,
                    2000,
                    mean,
                )
    return c.result()


@case
def policy_loss() -> Any:
    c, random = Comparison(), generator()
    count, sequences = 700, 5
    ids = torch.sort(torch.randint(sequences, (count,), generator=random)).values
    for dtype in (torch.float32, torch.float64):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        logprobs, old, ref, rollout = (
            (-torch.rand(count, generator=random) - 0.2 * torch.rand(1, generator=random)).to(dtype)
            for _ in range(4)
        )
        entropy, advantages = (torch.randn(count, generator=random).to(dtype) for _ in range(2))
        weights = (torch.rand(count, generator=random) < 0.8).to(dtype) / count
        sums = c.run(
            f"sums {dtype}",
            ops.policy_sequence_sums,
            logprobs,
            old,
            rollout,
            weights,
            ids,
            sequences,
            tolerance=1e-6,
        )
        for objective, level in POLICY_LOSSES:
            by_sequence = level == "sequence" or objective == "vespo"
            bounds = (0.2, 0.3, 3.0, 0.5, 2.0, math.inf, math.inf)
            numbers = [*bounds, 0.1, math.inf, math.inf, 0.01, *(1.0, 3.0, 1.05, 2.0)]
            options = (objective, level, "tis", "geometric_mean", "k3", "plain", numbers)
            fields = (
                logprobs,
                entropy,
                old,
                advantages,
                weights,
                ref,
                rollout,
                ids if by_sequence else None,
                sums if by_sequence else None,
            )
            name = f"{objective} {level} {dtype}"
            c.run(name, ops.policy_loss, *fields, *options, tolerance=tolerance)
            upstream = torch.tensor([1.7], dtype=dtype)
            c.run(
                f"backward {name}", ops.policy_loss_backward, upstream, *fields, *options, tolerance=tolerance
            )
    return c.result()


@case
def packing() -> Any:
    c, random = Comparison(), generator()
    lengths = torch.tensor([5, 0, 700, 31], dtype=torch.int32)
    starts = torch.tensor([0, 5, 5, 705])
    total, sequences = 736, 4
    ids = torch.randint(1000, (total,), generator=random)
    mask = torch.randint(2, (total,), generator=random).to(torch.uint8)
    logprobs = -torch.rand(total, generator=random)
    for cp_size in (1, 2):
        padded = [-(-int(n) // (2 * cp_size)) * 2 * cp_size for n in lengths]
        cu = torch.tensor([0, *torch.tensor(padded).cumsum(0).tolist()], dtype=torch.int32)
        advantages = torch.randn(sequences, generator=random)
        for rank in range(cp_size):
            for given in (None, logprobs):
                c.run(
                    f"pack {cp_size} {rank}",
                    ops.pack_sequences,
                    ids,
                    mask,
                    given,
                    starts,
                    lengths,
                    torch.arange(sequences),
                    advantages,
                    cu,
                    int(cu[-1]) // cp_size,
                    rank,
                    cp_size,
                    tolerance=0.0,
                )
    cu = torch.tensor([0, 5, 5, 705, 736], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64):
        values = torch.randn(total, generator=random).mul(100).to(dtype)
        c.run(f"unpack {dtype}", ops.unpack_values, values, cu, lengths, starts, total, tolerance=0.0)
    return c.result()


@case
def registered() -> Any:
    """Mangled names of the kernels that megarl._C registers, and of those with a host implementation."""
    lib = Path(os.environ["FAKECUDA_LIB"])
    cudart = ctypes.CDLL(str(lib / "libcudart.so.13"))
    ctypes.CDLL(os.environ["FAKECUDA_KERNELS"])
    visitor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)
    found: dict[str, list[str]] = {"kernels": [], "implementations": []}
    for name, names in found.items():
        visit = visitor(lambda _, mangled, names=names: names.append(mangled.decode()))
        getattr(cudart, f"fakecuda_visit_{name}")(visit, None)
    return {name: sorted(n for n in names if "megarl" in n) for name, names in found.items()}


@case
def illegal_index(what: str) -> str:
    """A kernel that is given an index out of range stops, and every later call says so, as on a device."""
    try:
        logits = torch.randn(3, 37, device="cuda")
        index = torch.tensor([0, 7, 1] if what == "index" else [0, 2, 1], device="cuda")
        ops.token_logprob(
            logits, torch.tensor([1, 2, 3]).cuda(), torch.ones(1).cuda(), 0, index, None, False
        ).cpu()
        return "nothing"
    except RuntimeError as error:
        return str(error).splitlines()[0]


if __name__ == "__main__":
    main()
