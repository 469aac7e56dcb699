"""Build the native extension megarl._C; everything else about the package is in pyproject.toml.

CUDA kernels are built if FORCE_CUDA=1, or if both nvcc and a CUDA build of torch are present.
CPU kernels use the widest vector instructions of the building machine, as megarl._C. A wheel is used on
other machines: it has megarl._C_avx2 and megarl._C_avx512, of which megarl/ops/_load.py loads one
(MEGARL_CPU_CAPABILITY=native or all overrides). Only commands that compile import torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The toolkit of NVIDIA's wheels, which a CUDA environment contains whether or not the machine has one.
WHEEL_TOOLKIT = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"

# at::vec takes its vector width from these definitions; they mirror how torch compiles its own kernels.
CPU_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
        *["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    ],
}


COMPILING = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}


def find_toolkit() -> str:
    """Return nvcc's path and set CUDA_HOME to match: the machine's toolkit, else the wheels'; "" for none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None and (WHEEL_TOOLKIT / "bin" / "nvcc").is_file():
        os.environ["CUDA_HOME"] = str(WHEEL_TOOLKIT)
        nvcc = str(WHEEL_TOOLKIT / "bin" / "nvcc")
    return nvcc or ""


def cudart_directory() -> str:
    """Return a directory where the linker finds libcudart.so; wheels have only its versioned name."""
    links = ROOT / "build" / "cudart"
    links.mkdir(parents=True, exist_ok=True)
    library = links / "libcudart.so"
    library.unlink(missing_ok=True)
    library.symlink_to(WHEEL_TOOLKIT / "lib" / "libcudart.so.13")
    return str(links)


def decide_cuda(cuda_version: str | None, nvcc: str) -> tuple[bool, str]:
    """Return whether to build the CUDA kernels, and why; exit if they are required but nvcc is missing."""
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


def modules_to_build(native: str) -> dict[str, str]:
    """Return vector instructions by extension module. ``native`` are those of the building machine."""
    wanted = os.environ.get("MEGARL_CPU_CAPABILITY", "all" if "bdist_wheel" in sys.argv else "native")
    if wanted not in ("all", "native"):
        raise SystemExit(f"error: MEGARL_CPU_CAPABILITY is native or all (got {wanted})")
    if wanted == "all" and native in CPU_FLAGS:
        return {f"megarl._C_{name.lower()}": name for name in CPU_FLAGS}
    return {"megarl._C": native if native in CPU_FLAGS else "DEFAULT"}


def native_extensions() -> dict[str, Any]:
    """Return setup()'s arguments for the extension modules; print the decisions in one line."""
    nvcc = find_toolkit()  # before torch.utils.cpp_extension is imported, which reads CUDA_HOME
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda, reason = decide_cuda(torch.version.cuda, nvcc)
    if cuda and not torch.cuda.is_available():  # no GPU to detect: build for A100, H100, B200
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
    modules = modules_to_build(torch.backends.cpu.get_cpu_capability())
    widths = ", ".join(modules.values())
    print(f"megarl._C: CUDA {'on' if cuda else 'off'} ({reason}), CPU vector instructions {widths}")

    sources = [ROOT / "csrc" / "bindings.cpp", *(ROOT / "csrc").glob("*/*.cpp")]
    if cuda:
        sources += (ROOT / "csrc").glob("*/*.cu")
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    cxx += ["-Wall", "-Wno-unknown-pragmas"]
    if cuda:
        cxx.append("-DMEGARL_WITH_CUDA")
    extensions = [
        (CUDAExtension if cuda else CppExtension)(
            name=name,
            sources=sorted(str(path.relative_to(ROOT)) for path in sources),
            include_dirs=[str(ROOT / "csrc")],
            library_dirs=[cudart_directory()] if cuda and WHEEL_TOOLKIT.is_dir() else [],
            extra_compile_args={
                "cxx": [*cxx, *CPU_FLAGS.get(width, []), f'-DMEGARL_CPU_CAPABILITY="{width}"'],
                "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"],
            },
            extra_link_args=["-fopenmp"],
        )
        for name, width in modules.items()
    ]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


def python_packages() -> dict[str, Any]:
    """Return the packages; in a wheel the shipped configurations are included as megarl/configs."""
    packages = find_packages(include=["megarl*"])
    if "bdist_wheel" not in sys.argv:
        return {"packages": packages}
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file()}
    shipped = {"megarl." + ".".join(folder.parts): str(folder) for folder in folders}
    return {
        "packages": [*packages, *shipped],
        "package_dir": shipped,
        "package_data": {name: ["*"] for name in shipped},
    }


if __name__ == "__main__":
    # tools/setup_env.sh builds the extension in place, where ninja keeps the objects between builds;
    # its editable install then needs only the metadata.
    compiles = not COMPILING.isdisjoint(sys.argv) and os.environ.get("MEGARL_METADATA_ONLY") != "1"
    setup(**python_packages(), **(native_extensions() if compiles else {}))
