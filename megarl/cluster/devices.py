"""GPUs of this machine: driver version, and checks before ranks start."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megarl.errors import UserError

_NVML = "libnvidia-ml.so.1"
# First driver branch that supports a major version of CUDA.
_FIRST_DRIVER = {12: 525, 13: 580}
_CPU = "MEGARL_PLATFORM=cpu trains without a GPU"


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, the newest CUDA it supports, and the number of GPUs."""

    version: str
    cuda: tuple[int, int]
    num_devices: int

    def __str__(self) -> str:
        return f"driver {self.version}, for CUDA up to {self.cuda[0]}.{self.cuda[1]}"

    def problem(self, built_for: str) -> str | None:
        """Return why code built for this CUDA version ("13.0") cannot run, or None."""
        major = int(built_for.partition(".")[0])
        if self.cuda[0] >= major:
            return None
        needed = f", {_FIRST_DRIVER[major]} or newer" if major in _FIRST_DRIVER else ""
        return f"{self}, is too old: torch was built for CUDA {built_for} and needs a driver for it{needed}"


def find_driver() -> Driver | None:
    """Query the loaded driver through NVML, which needs no CUDA; None without a driver."""
    try:
        nvml = ctypes.CDLL(_NVML)
        if nvml.nvmlInit_v2() != 0:  # the library is installed, the kernel module is not loaded
            return None
    except (OSError, AttributeError):
        return None
    try:
        text, cuda, count = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
        failed = (
            nvml.nvmlSystemGetDriverVersion(text, len(text))
            or nvml.nvmlSystemGetCudaDriverVersion(ctypes.byref(cuda))
            or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        )
    finally:
        nvml.nvmlShutdown()
    if failed:
        return None
    return Driver(text.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10), count.value)


def check_devices(num_ranks: int, environ: Mapping[str, str] = os.environ) -> None:
    """Check the GPUs for ``num_ranks`` trainer ranks on this machine.

    Without GPUs, with a CPU build of torch, without visible devices and with MEGARL_PLATFORM=cpu the run uses
    the CPU. GPUs that cannot be used are an error. torch is imported only if there is a driver.

    Raises:
        UserError: the driver is too old or CUDA fails, there are more ranks than GPUs, a GPU is listed twice,
            or megarl._C has no CUDA kernels.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    if environ.get("MEGARL_PLATFORM") == "cpu" or (names is not None and names[0] in ("", "-1")):
        return
    driver = find_driver()
    if driver is None or driver.num_devices == 0:
        return
    import torch

    if torch.version.cuda is None:
        return
    for name, count in Counter(names or []).items():
        if count > 1:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES: lists {name} {count} times (got {visible}); ranks cannot share a GPU"
            )
    if not torch.cuda.is_available():
        problem = driver.problem(torch.version.cuda) or (
            f"torch sees none of {driver.num_devices} GPUs ({driver}): {_cuda_error()}"
        )
        raise UserError(f"CUDA: {problem}; {_CPU}")
    if num_ranks > torch.cuda.device_count():
        where = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "parallel.num_processes"
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise UserError(
            f"{where}: {num_ranks} ranks need {num_ranks} visible GPUs, this machine has "
            f"{torch.cuda.device_count()}{shown}; NCCL takes one rank per GPU; {_CPU}"
        )
    if not has_cuda_kernels():
        raise UserError(
            "megarl._C: built without CUDA kernels, and there is a GPU: FORCE_CUDA=1 make setup builds them"
        )


def has_cuda_kernels() -> bool:
    """Return whether the native extension was built with nvcc."""
    import torch

    import megarl.ops  # noqa: F401  (loads it)

    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("megarl::token_logprob", "CUDA"))


def _cuda_error() -> str:
    """Return the error of CUDA's initialisation, in one line."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no reason given"
