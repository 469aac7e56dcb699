"""Builds the native extension megarl._C; everything else about the package is in pyproject.toml.

CUDA kernels are built when FORCE_CUDA=1, or when both nvcc and a CUDA build of torch are present.
CPU kernels use the widest vector instructions the building machine has.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
# The toolkit of NVIDIA's wheels, which a CUDA environment holds whether or not the machine has one.
WHEEL_TOOLKIT = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"

# at::vec picks its vector width from these definitions; they mirror how torch compiles its own kernels.
CPU_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
        *["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    ],
}


def find_toolkit() -> str:
    """Where nvcc is, CUDA_HOME set to match: the machine's toolkit before that of the wheels; "" for none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None and (WHEEL_TOOLKIT / "bin" / "nvcc").is_file():
        os.environ["CUDA_HOME"] = str(WHEEL_TOOLKIT)
        nvcc = str(WHEEL_TOOLKIT / "bin" / "nvcc")
    return nvcc or ""


def cudart_directory() -> str:
    """A directory where the linker finds libcudart.so: wheels carry it under its versioned name only."""
    links = ROOT / "build" / "cudart"
    links.mkdir(parents=True, exist_ok=True)
    library = links / "libcudart.so"
    library.unlink(missing_ok=True)
    library.symlink_to(WHEEL_TOOLKIT / "lib" / "libcudart.so.13")
    return str(links)


def decide_cuda(cuda_version: str | None, nvcc: str) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason to print; ends where they are wanted without nvcc."""
    if os.environ.get("FORCE_CUDA") == "1":
        if not Path(nvcc).is_file():
            where = f"no {nvcc}" if nvcc else "neither on PATH nor in CUDA_HOME"
            raise SystemExit(
                f"error: FORCE_CUDA=1 needs nvcc ({where}): install CUDA's toolkit, or set CUDA_HOME"
            )
        return True, "FORCE_CUDA=1"
    if cuda_version is None:
        return False, "torch is a CPU build"
    if not nvcc:
        return False, "nvcc not found"
    return True, f"torch for CUDA {cuda_version}, {nvcc}"


def native_extension() -> dict[str, Any]:
    """What setup() takes to build the extension; prints the decisions in one line."""
    nvcc = find_toolkit()  # before torch.utils.cpp_extension is imported, which reads CUDA_HOME
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda, reason = decide_cuda(torch.version.cuda, nvcc)
    if cuda and not torch.cuda.is_available():  # nobody to ask: A100, H100, B200
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
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
    extension = (CUDAExtension if cuda else CppExtension)(
        name="megarl._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=[cudart_directory()] if cuda and WHEEL_TOOLKIT.is_dir() else [],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    # tools/setup_env.sh builds the extension in place, where ninja keeps the objects between builds;
    # its editable install then needs the metadata alone.
    setup(**({} if os.environ.get("MEGARL_METADATA_ONLY") == "1" else native_extension()))
