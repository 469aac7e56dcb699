"""Measure the host work of one microbatch: kernel launches, device syncs, and their locations.

A step of SFT and one of GRPO (shared prompts, logprobs before the update) of a model of Qwen3-0.6B's width
and vocabulary: once plain, for the time; once with torch's warnings at every sync; once under its profiler,
whose trace goes to trace.json.gz.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpu_checks import checkpoints
from gpu_checks.report import Report

MOST_BYTES = 15 * 2**20  # of the trace


def run(report: Report) -> None:
    """Measure both kinds of step; the profiler comes last, since it breaks most easily."""
    config = checkpoints.TINY if report.quick else checkpoints.SMALL
    with tempfile.TemporaryDirectory() as work:
        begin = time.perf_counter()
        folder = checkpoints.write(config, Path(work) / "model", torch.bfloat16)
        policy = build(folder, 512 if report.quick else 8192)
        report.figure("model_ready_s", time.perf_counter() - begin)
    report.figure("parameters_m", sum(p.numel() for p in policy.params.values()) / 1e6)
    steps = dict(make_steps(policy, config, report.quick))
    for name, (step, num_microbatches, num_tokens) in steps.items():
        timed(report, policy, name, step, num_microbatches, num_tokens)
    for name, (step, num_microbatches, _) in steps.items():
        waits(report, name, step, num_microbatches)
    for name, (step, num_microbatches, _) in steps.items():
        profiled(report, name, step, num_microbatches)


def build(folder: str, budget: int) -> Any:
    """Build a trained policy on one rank."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.parallel import ParallelConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.initialize import initialize

    context = initialize(ParallelConfig(), seed=1)
    from megarl.trainer.megatron.trainer import MegatronTrainer

    return MegatronTrainer(
        context,
        load_architecture(folder),
        ModelConfig(path=folder, dtype="bfloat16"),
        PackingConfig(max_tokens_per_microbatch=budget),
        OptimizerConfig(lr=1e-5, lr_warmup_steps=0, distributed=True),
        100,
    )


def make_steps(
    policy: Any, config: dict[str, Any], quick: bool
) -> Iterator[tuple[str, tuple[Callable[[], None], int, int]]]:
    """Yield name -> (the packed step, its microbatches, its tokens)."""
    from megarl.losses.policy import PolicyLoss
    from megarl.losses.sft import sft_loss
    from megarl.ops.policy_loss import PolicyLossOptions
    from megarl.trainer.passes import fill_logprobs, train_step

    count, shortest, longest, prompts = (16, 20, 60, 20) if quick else (64, 128, 640, 256)
    for name, shared in (("sft", 0), ("grpo", prompts)):
        drawn, advantages = checkpoints.sequences(
            7, count, shortest, longest, config["vocab_size"], prompts=shared
        )
        batches = policy.prepare(drawn, "token", advantages=advantages).batches
        loss = sft_loss if name == "sft" else PolicyLoss(PolicyLossOptions(correction="tis"))

        def step(batches: Any = batches, loss: Any = loss, old: bool = name == "grpo") -> None:
            if old:
                fill_logprobs(policy, batches, "old_logprobs", temperature=1.0)
            train_step(policy, batches, loss, temperature=1.0)

        yield name, (step, len(batches), sum(batch.token_ids.shape[0] for batch in batches))


def timed(
    report: Report, policy: Any, name: str, step: Callable[[], None], num_microbatches: int, num_tokens: int
) -> None:
    """Time a warm step, and its share of the GPU's matrix-product rate (6 N T FLOPs)."""
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if report.quick else 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    parameters = sum(p.numel() for p in policy.params.values())
    passes = 6 if name == "sft" else 8  # forward 2, backward 4, logprobs before the step 2
    report.figure(
        f"{name}_step",
        {
            "first_s": times[0],
            "warm_s": seconds,
            "microbatches": num_microbatches,
            "tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "tflop_per_s": passes * parameters * num_tokens / seconds / 1e12,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        },
    )


@contextmanager
def counting_waits(found: Counter[str]) -> Iterator[None]:
    """Count torch's sync warnings by the innermost line of MegaRL or Megatron."""
    packages = _packages()

    def seen(message: Any, *rest: Any, **named: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        stack = traceback.extract_stack()[:-1]
        frame = next((f for f in reversed(stack) if f.filename.startswith(packages)), stack[-1])
        file = re.sub(r".*/(?=megarl/|megatron/core/)", "", frame.filename)
        found[f"{file}:{frame.lineno} {frame.line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _packages() -> tuple[str, ...]:
    """Return the folders of MegaRL and Megatron-Core, with trailing slashes."""
    specs = [find_spec(name) for name in ("megarl", "megatron.core") if find_spec(name.split(".")[0])]
    folders = [f for spec in specs if spec is not None for f in spec.submodule_search_locations or ()]
    return tuple(f"{folder}/" for folder in folders)


def waits(report: Report, name: str, step: Callable[[], None], num_microbatches: int) -> None:
    """Report syncs per step and their lines; those of a forward pass also count for GRPO's first pass."""
    found: Counter[str] = Counter()
    with counting_waits(found):
        step()
    total = sum(found.values())
    report.figure(f"{name}_waits", {"step": total, "per_microbatch": total / num_microbatches})
    report.figure(f"{name}_waits_where", dict(found.most_common(40)))
    report.summary(f"{name}: {total / num_microbatches:.1f} waits per microbatch")


def profiled(report: Report, name: str, step: Callable[[], None], num_microbatches: int) -> None:
    """Report kernels per microbatch, the longest of them, and the device's busy share of the time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    events = profile.events()
    on_host = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    ranges = set(on_host)  # also shown on the device, around their kernels
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    on_device = [event for event in on_device if event.name not in ranges]
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    busy = sum(event.time_range.elapsed_us() for event in on_device)
    calls = Counter(name for name in on_host if name.startswith("cu"))
    num_kernels = (len(on_device) - copies) / num_microbatches
    top = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)[:25]
    report.figure(
        f"{name}_profile",
        {
            "kernels_per_microbatch": num_kernels,
            "copies_per_microbatch": copies / num_microbatches,
            "device_busy": busy / 1e6 / seconds,
            "step_s_under_profiler": seconds,
            "runtime_calls": dict(calls.most_common(12)),
        },
    )
    report.figure(f"{name}_longest_ms", {row.key[:120]: row.self_device_time_total / 1e3 for row in top})
    report.check(bool(on_device) or report.quick, f"{name}: the profiler saw no kernel")
    if name == "grpo":
        keep_trace(report, profile)
    report.summary(f"{name}: {num_kernels:.0f} kernels per microbatch")


def keep_trace(report: Report, profile: Any) -> None:
    """Keep the trace, compressed, if it is small enough to copy."""
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work) / "trace.json"
        profile.export_chrome_trace(str(plain))
        packed = Path(work) / "trace.json.gz"
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        size = packed.stat().st_size
        report.figure("trace_mib", size / 2**20)
        if size <= MOST_BYTES:
            shutil.copy(packed, report.out / "trace.json.gz")
