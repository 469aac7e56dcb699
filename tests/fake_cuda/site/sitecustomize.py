"""With FAKECUDA=1 and this folder on PYTHONPATH every Python process gets the fake GPUs.

The fake libraries are loaded before torch: what is loaded under a name is what torch gets, whatever its
RPATH says. After each module that brings operators for CUDA, these get the CPU's kernels (``operators/``).
Ray's workers, ranks and engines inherit the two variables, so all of a run's processes are on the fake GPUs.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = ("libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1", "libnccl.so.2", "libcupti.so.13")


def replace_operators(module: ModuleType) -> None:
    """Give the operators that have come with ``module`` the CPU's kernels."""
    import torch

    path = _library("libfakecuda_ops.so")
    torch.ops.load_library(path)  # once; later calls find it loaded
    ctypes.CDLL(path).fakecuda_sweep()


def run_triton_on_the_host(module: ModuleType) -> None:
    """Triton's interpreter on device memory itself, and in stream order."""
    import fakecuda_triton

    fakecuda_triton.install(module, ctypes.CDLL(_library("libcudart.so.13")))


def sample_by_torch(module: Any) -> None:
    """VLLM's top-k and top-p kernel does not run in Triton's interpreter; it has the same by torch."""
    module.apply_top_k_top_p_triton = module.apply_top_k_top_p_pytorch


def find_the_fake_runtime(module: Any) -> None:
    """VLLM looks for a libcudart in the process: the first of that name may be one that nobody uses."""
    original = module.find_loaded_library
    module.find_loaded_library = lambda name: (
        _library("libcudart.so.13") if name == "libcudart" else original(name)
    )


def reduce_by_nccl(module: Any) -> None:
    """The kernel of vLLM's own all-reduce waits for flags that other ranks' kernels set."""
    module.CustomAllreduce.should_custom_ar = lambda self, tensor: False


# Actions after the import of a module.
AFTER: dict[str, Callable[[ModuleType], None]] = {
    "torch": replace_operators,
    "torchvision": replace_operators,
    "megarl._C": replace_operators,
    "vllm._C_stable_libtorch": replace_operators,
    "vllm._moe_C_stable_libtorch": replace_operators,
    "vllm.vllm_flash_attn.flash_attn_interface": replace_operators,
    "triton.runtime.interpreter": run_triton_on_the_host,
    "vllm.v1.sample.ops.topk_topp_sampler": sample_by_torch,
    "vllm.utils.system_utils": find_the_fake_runtime,
    "vllm.distributed.device_communicators.custom_all_reduce": reduce_by_nccl,
}


def _library(name: str) -> str:
    return str(Path(os.environ["FAKECUDA_LIB"]) / name)


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then what AFTER says."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        AFTER[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


if os.environ.get("FAKECUDA") == "1":
    for library in LIBRARIES:
        ctypes.CDLL(_library(library), mode=ctypes.RTLD_GLOBAL)
else:
    AFTER.clear()
if os.environ.get("FAKECUDA_TAPE"):
    import fakecuda_tape

    AFTER["megarl.sampling.rollout_manager"] = fakecuda_tape.tape_rollouts
    AFTER["megarl.loops.online"] = fakecuda_tape.leave_out_the_engine
if AFTER:
    sys.meta_path.insert(0, _Finder())
