"""Builds the native extension megarl._C; everything else about the package is in pyproject.toml.

CUDA kernels are built when FORCE_CUDA=1, or when both nvcc and a CUDA build of torch are present.
CPU kernels use the widest vector instructions the building machine has.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent

# at::vec picks its vector width from these definitions; they mirror how torch compiles its own kernels.
CPU_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
        *["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    ],
}


def decide_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason to print."""
    if os.environ.get("FORCE_CUDA") == "1":
        return True, "FORCE_CUDA=1"
    if torch.version.cuda is None:
        return False, "torch is a CPU build"
    if shutil.which("nvcc") is None:
        return False, "nvcc not found"
    return True, f"nvcc and torch for CUDA {torch.version.cuda} found"


def native_extension() -> CppExtension:
    """The extension with its sources and flags; prints the decision in one line."""
    cuda, reason = decide_cuda()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = CPU_FLAGS.get(capability, [])
    built_for = capability if flags else "DEFAULT"
    print(f"megarl._C: CUDA {'on' if cuda else 'off'} ({reason}), CPU vector instructions {built_for}")

    sources = [ROOT / "csrc" / "bindings.cpp", *(ROOT / "csrc").glob("*/*.cpp")]
    if cuda:
        sources += (ROOT / "csrc").glob("*/*.cu")
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    cxx += ["-Wall", "-Wno-unknown-pragmas", *flags]
    cxx.append(f'-DMEGARL_CPU_CAPABILITY="{built_for}"')
    if cuda:
        cxx.append("-DMEGARL_WITH_CUDA")
    return (CUDAExtension if cuda else CppExtension)(
        name="megarl._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]},
        extra_link_args=["-fopenmp"],
    )


if __name__ == "__main__":
    # tools/setup_env.py builds the extension in place, where ninja keeps the objects between builds;
    # its editable install then needs the metadata alone.
    metadata_only = os.environ.get("MEGARL_METADATA_ONLY") == "1"
    setup(ext_modules=[] if metadata_only else [native_extension()], cmdclass={"build_ext": BuildExtension})
