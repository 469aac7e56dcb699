"""Report versions: the GPU, the driver, torch and its libraries, the compilers, the packages."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

from gpu_checks.report import Report

PACKAGES = (
    "megatron-core",
    "pydantic",
    "numpy",
    "safetensors",
    "pytest",
    "transformer-engine",
    "vllm",
    "triton",
)


def run(report: Report) -> None:
    """Fail if there is no GPU that the other steps can use."""
    import torch

    report.figure("python", sys.version.split()[0])
    report.figure("torch", torch.__version__)
    report.figure("torch_cuda", torch.version.cuda)
    report.figure("packages", {name: _version(name) for name in PACKAGES})
    tools = ("nvcc", "c++", "ninja")
    report.figure("compilers", {name: _first_line(name) for name in tools})
    report.figure("host_cores", len(os.sched_getaffinity(0)))
    report.figure(
        "driver", _output("nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv")
    )
    if not torch.cuda.is_available():
        report.problem("torch sees no CUDA device")
        return
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    report.figure("cudnn", torch.backends.cudnn.version())
    report.figure("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    report.figure("multiprocessors", card.multi_processor_count)
    report.figure("capability", f"{card.major}.{card.minor}")
    report.figure("l2_mib", getattr(card, "L2_cache_size", 0) / 2**20)
    report.figure("memory_gib", total / 2**30)
    report.figure("free_memory_gib", free / 2**30)
    report.summary(
        f"{card.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch {torch.__version__}, "
        f"megatron-core {_version('megatron-core')}"
    )
    report.check((card.major, card.minor) >= (8, 0), f"capability {card.major}.{card.minor} is below 8.0")
    total = torch.arange(1000, device="cuda").sum().item()
    report.check(total == 499500, f"the sum of 0 ... 999 is {total} on the device")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(tool: str) -> str | None:
    output = _output(tool, "--version")
    if output is None:
        return None
    lines = output.splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except subprocess.TimeoutExpired:
        return "no answer"
