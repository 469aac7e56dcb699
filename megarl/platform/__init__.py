"""The trainer's platform: CUDA + NCCL, or a CPU + gloo. Only this package distinguishes them.

``install()`` is called once per trainer process, before megatron.core is imported, and returns the chosen
platform. Importing this package changes nothing and does not import torch: launchers ask it before they start
ranks. cuda.py is for GPUs only, cpu.py for CPUs only, megarl/platform/megatron.py for megatron-core on both.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Platform:
    """The device as the rest of MegaRL sees it."""

    name: Literal["cuda", "cpu"]
    device: torch.device
    backend: Literal["nccl", "gloo"]


_installed: Platform | None = None


def chosen_name() -> Literal["cuda", "cpu"]:
    """Return the platform that ``install()`` will choose. MEGARL_PLATFORM=cpu forces the CPU."""
    if os.environ.get("MEGARL_PLATFORM") == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def install(*, megatron: bool = True) -> Platform:
    """Choose the platform and adapt torch and megatron-core to it; imports megatron.core.

    Without ``megatron`` megatron-core is not imported, and on a CPU torch is left unchanged. A second call
    returns the first one's result.
    """
    global _installed
    if _installed is not None:
        return _installed
    assert "megatron.core" not in sys.modules, "platform.install() must come before importing megatron.core"
    import torch

    if chosen_name() == "cuda":
        from megarl.platform import cuda

        chosen = Platform("cuda", torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl")
        cuda.install(chosen.device)
    else:
        chosen = Platform("cpu", torch.device("cpu"), "gloo")
    if megatron:
        _fit_megatron(chosen)
    _installed = chosen
    return chosen


def _fit_megatron(chosen: Platform) -> None:
    from megarl.platform import cpu, megatron

    if chosen.name == "cpu":
        cpu.map_torch()
    megatron.install()
    if chosen.name == "cpu":
        cpu.map_megatron()


def current() -> Platform:
    """Return the installed platform; call ``install()`` first."""
    assert _installed is not None, "megarl.platform.install() has not been called"
    return _installed


def synchronize() -> None:
    """Wait for all work that this process has launched on its device."""
    from megarl.platform.memory import wait_for

    wait_for(current().device)


def device_name() -> str:
    """Return the name of the GPU, or "cpu"."""
    if (chosen := current()).name == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(chosen.device)


def allocated_bytes() -> tuple[int, int]:
    """Return what torch's allocator holds of this rank's GPU, in use and in all; (0, 0) on a CPU."""
    if current().name == "cpu":
        return 0, 0
    import torch

    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def peak_memory_gib() -> float:
    """Return this process's peak memory so far: device memory on CUDA, resident memory on a CPU."""
    if current().name == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
