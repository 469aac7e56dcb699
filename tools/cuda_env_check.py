"""Check the CUDA environment as far as possible without a GPU: `make cuda-env-check`.

Run by that environment's Python. Builds megarl._C with the CUDA kernels, checks that every op of
csrc/bindings.cpp has one for CUDA, and imports every module of megarl and every name that its sources import
from other packages, late imports included.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import importlib
import importlib.util
import logging
import os
import pkgutil
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".setup" / "cuda-build"
# Loaded by a GPU run through configuration or in other processes: no import statement of megarl names them.
GPU_MODULES = (
    "cuda.bindings.runtime",
    "flashinfer",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer.distrib_optimizer",
    "peft",
    "triton",
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.cumem_allocator",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.platforms.cuda",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
# Optional packages: imported only when a run asks for them.
TRANSFORMER_ENGINE = ("transformer_engine", "megatron.core.extensions.transformer_engine")
SINKS = ("mlflow", "pandas", "swanlab", "trackio")  # extras that no lock holds


def build_extension(arch: str) -> None:
    """Build megarl._C with its CUDA kernels, outside the tree."""
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # ninja
    directories = ["--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    command = [sys.executable, "setup.py", "build_ext", "--force", *directories]
    log = ROOT / ".setup" / "cuda-build.log"
    with log.open("w") as output:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
    if status != 0:
        end = "\n".join(log.read_text().splitlines()[-12:])
        sys.exit(f"cuda-env-check: megarl._C does not build (.setup/{log.name}):\n{end}")


def provide_driver() -> str:
    """Load libcuda.so.1; if there is none, a stub whose functions report that there is no device.

    vLLM's compiled libraries link to it; with it they load, and torch must have all their other symbols.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
        return "the machine's"
    except OSError:
        pass
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    command = ["nm", "-D", "--undefined-only", *Path(spec.origin).parent.rglob("*.so")]
    symbols = set(re.findall(r" U (cu[A-Z]\w+)", subprocess.check_output(command, text=True)))
    source, library = BUILD / "driver.cpp", BUILD / "libcuda.so.1"
    no_device = 100  # CUDA_ERROR_NO_DEVICE
    functions = (f'extern "C" int {name}() {{ return {no_device}; }}\n' for name in sorted(symbols))
    source.write_text("".join(functions))
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return f"none, {len(symbols)} functions of it stand in"


# Their inputs are always on the host: rank 0 computes advantages there, from numpy arrays.
HOST_OPS = {"gae", "group_advantage"}


def declared_ops() -> list[str]:
    """Return the ops with a schema in csrc/bindings.cpp."""
    return re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "bindings.cpp").read_text())


def ops_without_cuda(names: list[str]) -> list[str]:
    """Return the ops without a CUDA kernel; an op made of other ops counts as having one."""
    import torch

    def has_kernel(name: str) -> bool:
        return torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"megarl::{name}", "CUDA")

    return [name for name in names if not has_kernel(name)]


def foreign_names(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (module, name or "", optional) of every absolute import in a file from outside megarl.

    Optional are imports in a `try` that catches ImportError, or under `if TYPE_CHECKING`.
    """

    def visit(node: ast.AST, optional: bool) -> Iterator[tuple[str, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((node.module, alias.name, optional) for alias in node.names)
        if isinstance(node, ast.Try):
            caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
            optional = optional or "ImportError" in caught or "ModuleNotFoundError" in caught
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            optional = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, optional)

    for module, name, optional in visit(ast.parse(path.read_text()), False):
        if module.split(".")[0] not in sys.stdlib_module_names | {"megarl"}:
            yield module, name, optional


def why_not(module: str, name: str = "") -> str:
    """Return why `from module import name` fails; "" if it does not."""
    try:
        loaded = importlib.import_module(module)
        if name and name != "*" and not hasattr(loaded, name):
            importlib.import_module(f"{module}.{name}")
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}"
    return ""


def failing_imports() -> list[str]:
    """Return every import that fails, one line each; print absent optional packages."""
    problems = []
    wanted: dict[tuple[str, str], tuple[bool, Path]] = {
        (module, ""): (False, Path(__file__)) for module in GPU_MODULES
    }
    for path in sorted((ROOT / "megarl").rglob("*.py")):
        for module, name, optional in foreign_names(path):
            optional = optional or module.startswith((*TRANSFORMER_ENGINE, *SINKS))
            known, _ = wanted.get((module, name), (True, path))
            wanted[module, name] = (known and optional, path)
    absent = []
    for (module, name), (optional, path) in wanted.items():
        if reason := why_not(module, name):
            line = f"{path.relative_to(ROOT)}: {module}{'.' * bool(name)}{name}: {reason}"
            (absent if optional else problems).append(line)
    import megarl

    modules = [info.name for info in pkgutil.walk_packages(megarl.__path__, "megarl.")]
    problems += [f"{module}: {reason}" for module in modules if (reason := why_not(module))]
    print(f"{len(wanted)} imports from other packages, {len(modules)} modules of megarl")
    print("\n".join(f"  optional and absent: {line}" for line in absent))
    return problems


def main() -> int:
    """Run the check; return 0 if there are no problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="9.0", help="architectures, in the form of TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--no-build", action="store_true", help="use the extension of the last build")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about absent GPUs
    logging.disable(logging.WARNING)
    begin = time.monotonic()
    if not arguments.no_build:
        build_extension(arguments.arch)
        print(f"megarl._C builds for {arguments.arch} in {time.monotonic() - begin:.0f} s")
    sys.path.insert(0, str(ROOT))
    import megarl

    megarl.__path__.insert(0, str(BUILD / "megarl"))  # its _C before the tree's
    import torch

    from megarl.ops._load import load_native

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"driver: {provide_driver()}")
    load_native()
    names = [name for name in declared_ops() if name not in HOST_OPS]
    problems = [f"op {name} has no kernel for CUDA" for name in ops_without_cuda(names)]
    print(f"{len(names) - len(problems)} of {len(names)} ops have a kernel for CUDA: {', '.join(names)}")
    print(f"ops of the host alone: {', '.join(sorted(HOST_OPS))}")
    begin = time.monotonic()
    problems += failing_imports()
    print("\n".join(problems) or f"everything imports, in {time.monotonic() - begin:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
