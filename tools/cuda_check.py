"""Compile every CUDA kernel with nvcc and check the resource report; needs no GPU and no CUDA torch.

For each csrc/*/*_kernels.cuh all template variants are compiled for sm_80, sm_90 and sm_100. The check fails
on an error, on a register spill and on a stack frame (arrays in local memory), and prints registers, shared
memory and theoretical occupancy per kernel. ``--with-torch`` also compiles the launchers (*_cuda.cu) against
torch's headers, and registers them against the schemas of the built extension.

    .venv/bin/python tools/cuda_check.py [--arch sm_90] [--only token_logprob] [--with-torch]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]

LOGITS = ["float", "__nv_bfloat16", "__half", "double"]
# Header (without _kernels.cuh) -> its kernels with all template arguments used in launches.
VARIANTS: dict[str, list[str]] = {
    "token_logprob/token_logprob": [
        *(
            f"token_logprob::{k}<{t}, {m}>"
            for k in ("forward", "backward")
            for t in LOGITS
            for m in ("false", "true")
        ),
        *(f"token_logprob::combine_splits<{t}>" for t in LOGITS),
    ],
    "vocab_kl/vocab_kl": [
        f"vocab_kl::{k}<{t}>"
        for k in ("forward", "combine_splits", "backward", "js_forward", "js_combine_splits", "js_backward")
        for t in LOGITS
    ],
    "policy_loss/policy_loss": [
        f"policy_loss::{k}<{t}>"
        for k in ("forward", "backward", "sequence_sums")
        for t in ("float", "double")
    ],
    "packing/pack_sequences": [
        "pack_sequences::pack",
        *(f"pack_sequences::unpack<uint{bits}_t>" for bits in (16, 32, 64)),
    ],
    "segment/segment_reduce": [f"segment_reduce::{k}<{t}>" for k in ("forward", "backward") for t in LOGITS],
}


@dataclass(frozen=True)
class Device:
    """Per-SM limits on resident blocks (CUDA programming guide, compute capabilities)."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


DEVICES = {"sm_80": Device(164 * 1024), "sm_90": Device(228 * 1024), "sm_100": Device(228 * 1024)}


@dataclass(frozen=True)
class Kernel:
    """One entry function in ptxas' report."""

    name: str
    arch: str
    stack_bytes: int
    spill_bytes: int
    registers: int
    shared_bytes: int

    def resident_blocks(self, threads: int) -> int:
        """Return the number of blocks of ``threads`` threads that fit on one SM at the same time."""
        device = DEVICES[self.arch]
        warps = -(-threads // 32)
        registers_per_warp = -(-self.registers // 8) * 8 * 32
        shared = -(-self.shared_bytes // 128) * 128 + 1024  # 1 KiB per block is reserved by the system
        by_registers = device.registers // registers_per_warp // warps
        return min(device.blocks, device.warps // warps, by_registers, device.shared_bytes // shared)


def parse_report(report: str) -> Iterator[Kernel]:
    """Parse the kernels of ``nvcc -Xptxas -v`` (demangled)."""
    entry = r"Compiling entry function '(?P<name>[^']*)' for '(?P<arch>sm_\w+?)a?'"
    stack = r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes"
    used = r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
    for match in re.finditer(rf"{entry}.*?{stack}.*?{used}", report, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        name = match["name"].replace("(bool)0", "false").replace("(bool)1", "true")  # c++filt's spelling
        name = re.sub(r"^void |\(.*|megarl::", "", name)
        yield Kernel(
            name,
            match["arch"],
            int(match["stack"]),
            spills,
            int(match["registers"]),
            int(shared[1]) if shared else 0,
        )


def check_variants() -> list[str]:
    """Return the headers and kernels that VARIANTS misses."""
    problems = []
    found = {str(p.relative_to(CSRC)).removesuffix("_kernels.cuh") for p in CSRC.glob("*/*_kernels.cuh")}
    problems += [
        f"{name}_kernels.cuh is not in VARIANTS of tools/cuda_check.py"
        for name in sorted(found - set(VARIANTS))
    ]
    problems += [f"csrc/{name}_kernels.cuh does not exist" for name in sorted(set(VARIANTS) - found)]
    for header in sorted(found & set(VARIANTS)):
        source = (CSRC / f"{header}_kernels.cuh").read_text()
        defined = set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", source))
        listed = {re.sub(r"<.*|.*::", "", re.sub(r"<.*", "", v)) for v in VARIANTS[header]}
        problems += [f"{header}: kernel {name} is not in VARIANTS" for name in sorted(defined - listed)]
    return problems


def block_size(header: str) -> int:
    """Return the number of threads per block: the header's kThreads."""
    found = re.search(r"constexpr int kThreads = (\d+);", (CSRC / f"{header}_kernels.cuh").read_text())
    assert found, f"{header} has no kThreads"
    return int(found[1])


def run_nvcc(nvcc: str, arguments: list[str]) -> tuple[int, str]:
    """Return exit code and all output, demangled."""
    result = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    demangle = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangle is None:
        return result.returncode, result.stdout
    return result.returncode, subprocess.run(
        [demangle], input=result.stdout, capture_output=True, text=True
    ).stdout


def compile_kernels(nvcc: str, header: str, arches: list[str], work: Path) -> tuple[list[Kernel], str]:
    """Compile all variants of one header; return the kernels, or the compiler's message."""
    source = work / f"{header.replace('/', '_')}.cu"
    pointers = "\n".join(
        f"    reinterpret_cast<const void*>(&megarl::{variant})," for variant in VARIANTS[header]
    )
    source.write_text(
        f'#include "{header}_kernels.cuh"\n\nextern const void* const kernels[] = {{\n{pointers}\n}};\n'
    )
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in arches]
    target = str(source.with_suffix(".fatbin"))
    code, output = run_nvcc(nvcc, [*FLAGS, "-Xptxas", "-v", "-fatbin", *codes, str(source), "-o", target])
    return (list(parse_report(output)), "") if code == 0 else ([], output)


def compile_launcher(nvcc: str, source: Path, work: Path) -> str:
    """Compile one *_cuda.cu for sm_90 against torch's headers; return the message of a failure."""
    from torch.utils.cpp_extension import include_paths

    stub = work / "stub" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # CPU builds of torch lack it
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    includes = [f"-I{path}" for path in include_paths()] + [f"-I{work / 'stub'}"]
    target = str(work / f"{source.stem}.o")
    options = ["-w", "-arch=sm_90", "-Xcompiler", "-fPIC", "-c"]
    code, output = run_nvcc(nvcc, [*FLAGS, *includes, *options, str(source), "-o", target])
    return output if code else ""


# Data of libc10_cuda, which a CPU build of torch lacks; its functions are bound when called, that is, never.
STUB_SOURCE = (
    "namespace c10::cuda::CUDACachingAllocator { extern void* allocator; void* allocator = nullptr; }"
)
LOAD_LAUNCHERS = """
import ctypes, sys
from megarl.ops._load import load_native
load_native()
libc = ctypes.CDLL(None)
libc.dlopen.restype, libc.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
RTLD_LAZY = 1
if not libc.dlopen(sys.argv[1].encode(), RTLD_LAZY):
    sys.exit(libc.dlerror().decode())
"""


def check_registration(nvcc: str, work: Path) -> list[str]:
    """Link the launchers and load them with megarl._C: torch compares signatures with schemas."""
    import torch

    stub, library = work / "stub.cpp", work / "launchers.so"
    stub.write_text(STUB_SOURCE)
    torch_lib = Path(torch.__file__).parent / "lib"
    linker = [
        "-Xlinker",
        "-z,lazy",
        f"-L{torch_lib}",
        "-lc10",
        "-ltorch_cpu",
        "-Xlinker",
        f"-rpath,{torch_lib}",
    ]
    objects = [str(path) for path in sorted(work.glob("*_cuda.o"))]
    fpic = ["-shared", "-Xcompiler", "-fPIC"]
    code, output = run_nvcc(nvcc, [*fpic, str(stub), *objects, *linker, "-o", str(library)])
    if code:
        return [f"the launchers do not link:\n{output}"]
    command = [sys.executable, "-c", LOAD_LAUNCHERS, str(library)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        return [f"the launchers do not register:\n{result.stdout}"]
    print(f"{len(objects)} launchers register against the schemas")
    return []


def print_table(header: str, kernels: list[Kernel]) -> list[str]:
    """Print one line per kernel and architecture; return the problems."""
    threads, problems = block_size(header), []
    print(f"\n{header}_kernels.cuh, {threads} threads per block")
    print(f"  {'kernel':<50} {'arch':<7} registers  shared  blocks/SM  occupancy")
    for kernel in sorted(kernels, key=lambda k: (k.name, list(DEVICES).index(k.arch))):
        blocks = kernel.resident_blocks(threads)
        occupancy = blocks * -(-threads // 32) / DEVICES[kernel.arch].warps
        print(
            f"  {kernel.name:<50} {kernel.arch:<7} {kernel.registers:>9}  {kernel.shared_bytes:>6}"
            f"  {blocks:>9}  {occupancy:>9.0%}"
        )
        if kernel.spill_bytes:
            problems.append(f"{kernel.name} ({kernel.arch}) spills {kernel.spill_bytes} bytes of registers")
        elif kernel.stack_bytes:
            problems.append(f"{kernel.name} ({kernel.arch}) keeps {kernel.stack_bytes} bytes in local memory")
    return problems


def check_headers(nvcc: str, headers: list[str], arches: list[str], work: Path) -> list[str]:
    """Compile and check the kernels of all headers."""
    problems: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda header: compile_kernels(nvcc, header, arches, work), headers)
        for header, (kernels, message) in zip(headers, results, strict=True):
            if message:
                problems.append(f"{header}_kernels.cuh does not compile:\n{message}")
                continue
            problems += print_table(header, kernels)
            expected = len(VARIANTS[header]) * len(arches)
            if len(kernels) != expected:
                problems.append(f"{header}: ptxas reported {len(kernels)} kernels, {expected} were asked for")
    return problems


def check_launchers(nvcc: str, sources: list[Path], work: Path) -> list[str]:
    """Compile the launchers; print one line each."""
    problems: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        messages = pool.map(lambda source: compile_launcher(nvcc, source, work), sources)
        for source, message in zip(sources, messages, strict=True):
            print(f"{source.relative_to(ROOT)}: {'failed' if message else 'compiles'} for sm_90")
            if message:
                problems.append(f"{source.name} does not compile:\n{message}")
    return problems or check_registration(nvcc, work)


def main() -> int:
    """Run the check; return 0 if there are no problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=list(DEVICES), help="only these architectures")
    parser.add_argument("--only", default="", help="only files whose path contains this text")
    parser.add_argument(
        "--with-torch", action="store_true", help="also compile and register the launchers (minutes)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="succeed where there is no nvcc")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: nvcc is not on PATH: install the CUDA toolkit, 12.8 or newer (no GPU is needed)")
        return 0 if arguments.allow_missing else 1
    problems = check_variants()
    headers = [header for header in VARIANTS if arguments.only in header]
    with tempfile.TemporaryDirectory() as work:
        problems += check_headers(nvcc, headers, arguments.arch or list(DEVICES), Path(work))
        if arguments.with_torch:
            sources = [p for p in sorted(CSRC.glob("*/*_cuda.cu")) if arguments.only in str(p)]
            problems += check_launchers(nvcc, sources, Path(work))
    print("\n" + "\n".join(problems) if problems else "\nno spills, no local memory")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
