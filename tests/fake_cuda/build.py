"""Build the fake CUDA libraries: ``python tests/fake_cuda/build.py PYTHON`` prints their directory.

PYTHON is the interpreter of an environment with torch for CUDA; its wheels have the headers and the real
libraries, whose names are filled in. Objects stay in build/fake_cuda and are compiled when sources change.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE = HERE / "native"
BUILD = ROOT / "build" / "fake_cuda"
SIMT = ROOT / "tests" / "simt"
CXX = ["g++", "-std=c++20", "-fPIC", "-O2", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]

PROBE = """
import importlib.metadata, json, sysconfig
print(json.dumps([sysconfig.get_paths()["purelib"], importlib.metadata.version("torch")]))
"""


@dataclass(frozen=True)
class Wheels:
    """Paths of the environment's CUDA headers, libraries and torch."""

    site: Path
    torch_version: str

    @property
    def include(self) -> list[str]:
        """Compiler flags for the headers of CUDA and NCCL."""
        return [f"-I{self.site / part}" for part in ("nvidia/cu13/include", "nvidia/nccl/include")]

    @property
    def torch_include(self) -> list[str]:
        """Compiler flags for torch's headers, as system headers."""
        torch = self.site / "torch" / "include"
        return ["-isystem", str(torch), "-isystem", str(torch / "torch" / "csrc" / "api" / "include")]


@dataclass(frozen=True)
class Library:
    """One fake library: its sources, and the real one, whose remaining functions get stubs."""

    name: str
    sources: list[str]
    real: str = ""  # the real library in the environment, whose exported names with `prefix` are filled in
    prefix: str = ""
    version: str = ""  # the version node that its symbols have
    needs: list[str] = field(default_factory=lambda: ["libfakecuda.so"])


LIBRARIES = [
    Library("libfakecuda.so", ["session", "device", "streams", "memory", "kernels"], needs=[]),
    Library(
        "libcudart.so.13",
        ["runtime_device", "runtime_memory", "runtime_streams", "runtime_kernels"],
        "nvidia/cu13/lib/libcudart.so.13",
        "cuda,__cuda",
        "libcudart.so.13",
    ),
    Library("libcuda.so.1", ["driver"], "cuda.h", "cu"),
    Library("libnvidia-ml.so.1", ["nvml"]),
    Library(
        "libnccl.so.2",
        ["nccl", "nccl_transport"],
        "nvidia/nccl/lib/libnccl.so.2",
        "nccl,pnccl",
        needs=["libfakecuda.so", "libcudart.so.13"],
    ),
    Library("libcupti.so.13", ["cupti"], "nvidia/cu13/lib/libcupti.so.13", "cupti", "libcupti.so.13"),
]
PRELOAD_FLAGS = ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]


def probe(python: str) -> Wheels:
    """Ask an interpreter for the paths of its packages, without importing torch."""
    environment = {**os.environ, "FAKECUDA": "0"}
    text = subprocess.run(
        [python, "-c", PROBE], check=True, capture_output=True, text=True, env=environment
    ).stdout
    site, version = json.loads(text)
    return Wheels(Path(site), version)


def compile_object(source: Path, command: list[str]) -> Path:
    """Compile ``source`` unless the same preprocessed text was compiled before with the same flags."""
    preprocessed = subprocess.run([*command, "-E", "-P", str(source)], check=True, capture_output=True).stdout
    key = hashlib.sha256(preprocessed + " ".join(command).encode()).hexdigest()[:16]
    target = BUILD / "objects" / f"{source.stem}-{key}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        result = subprocess.run(
            [*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(f"g++ failed on {source.name}:\n{result.stderr}")
        os.replace(partial, target)
    return target


def exported(library: Path, prefixes: str) -> set[str]:
    """Return the names of the functions that a shared library or an object defines."""
    dynamic = ["-D"] if ".so" in library.name else []
    lines = subprocess.run(
        ["nm", *dynamic, "--defined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines if line.split()[-2] in "TWVB"}
    return {name for name in names if name.startswith(tuple(prefixes.split(",")))}


def driver_functions(wheels: Wheels) -> set[str]:
    """Return the names of the driver's functions from a header: there is no real libcuda.so.1."""
    import re

    text = subprocess.run(
        ["g++", "-E", "-P", *wheels.include, "-include", "cuda.h", "-x", "c++", "/dev/null"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return set(re.findall(r"\b(cu[A-Z]\w*)\s*\(", text))


def stubs(library: Library, objects: list[Path], wheels: Wheels) -> list[Path]:
    """Build an object with a stub for each name that the real library exports and the sources lack."""
    if not library.real:
        return []
    names = (
        driver_functions(wheels)
        if library.real == "cuda.h"
        else exported(wheels.site / library.real, library.prefix)
    )
    for o in objects:
        names -= exported(o, library.prefix)
    lines = ["void fakecuda_stub(const char*);"]
    lines += [f'int {name}(void) {{ fakecuda_stub("{name}"); return 0; }}' for name in sorted(names)]
    source = BUILD / f"stubs_{library.name.split('.')[0]}.c"
    source.write_text("\n".join(lines) + "\n")
    return [compile_object(source, ["gcc", "-fPIC", "-O1", "-w", "-fno-builtin"])]


def link(target: Path, objects: list[Path], arguments: list[str], version: str = "") -> None:
    """Link a shared library that finds its neighbours, under the real one's name."""
    if version:
        script = target.with_suffix(".map")
        script.write_text(f"{version} {{ global: *; }};\n")
        arguments = [*arguments, f"-Wl,--version-script={script}"]
    subprocess.run(
        [
            "g++",
            "-shared",
            "-o",
            str(target),
            f"-Wl,-soname,{target.name}",
            "-Wl,-rpath,$ORIGIN",
            *map(str, objects),
            *arguments,
            "-ldl",
            "-lpthread",
        ],
        check=True,
    )


def simt_objects() -> list[Path]:
    """Compile MegaRL's kernels and the executor that runs them, as tests/simt does."""
    sys.path.insert(0, str(ROOT))
    from tests.simt.executor import CHECKED_FLAGS, COMMON_FLAGS

    plain = ["g++", *COMMON_FLAGS, f"-I{NATIVE}"]
    jobs = [
        (NATIVE / "simt_kernels.cpp", [*plain, *CHECKED_FLAGS]),
        (SIMT / "simt_runtime.cpp", plain),
        (SIMT / "simt_memory.cpp", plain),
    ]
    return [compile_object(*job) for job in jobs]


def operator_objects(wheels: Wheels) -> list[Path]:
    """Compile the operator layer, tests/fake_cuda/operators."""
    flags = [*CXX, "-O1", "-Wno-unused-parameter", f"-I{NATIVE}", *wheels.include, *wheels.torch_include]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(
            pool.map(lambda source: compile_object(source, flags), sorted((HERE / "operators").glob("*.cpp")))
        )


def build_into(target: Path, wheels: Wheels) -> None:
    """Compile and link everything into ``target``."""
    native = [*CXX, "-fvisibility=default", f"-I{NATIVE}", *wheels.include]
    sources = [name for library in LIBRARIES for name in library.sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda name: compile_object(NATIVE / f"{name}.cpp", native), sources)
        objects = dict(zip(sources, compiled, strict=True))
    for library in LIBRARIES:
        own = [objects[name] for name in library.sources]
        needs = [str(target / name) for name in library.needs]
        link(target / library.name, own + stubs(library, own, wheels), needs, library.version)
    preload = compile_object(NATIVE / "preload.cpp", [*CXX, *PRELOAD_FLAGS])
    subprocess.run(
        ["gcc", "-shared", "-o", str(target / "libfakecuda_preload.so"), str(preload), "-ldl"], check=True
    )
    link(target / "libfakecuda_megarl.so", simt_objects(), [str(target / "libfakecuda.so")])
    if operators := operator_objects(wheels):
        torch = wheels.site / "torch" / "lib"
        libraries = [f"-L{torch}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-lc10_cuda", "-ltorch_cuda"]
        needs = [str(target / name) for name in ("libfakecuda.so", "libcudart.so.13")]
        link(target / "libfakecuda_ops.so", operators, [*libraries, *needs])


def fingerprint(wheels: Wheels) -> str:
    """Return a hash of the libraries' sources, torch and the compiler."""
    digest = hashlib.sha256(f"{wheels.site} {wheels.torch_version}".encode())
    digest.update(subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout)
    sources = [
        *NATIVE.glob("*"),
        *(HERE / "operators").glob("*"),
        *SIMT.glob("simt*"),
        *(ROOT / "csrc").glob("*/*.*h"),
        Path(__file__),
    ]
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def build(python: str) -> Path:
    """Return the directory of the libraries for this interpreter's environment; build it if missing."""
    wheels = probe(python)
    target = BUILD / fingerprint(wheels)
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        begin = time.monotonic()
        partial = BUILD / f"partial-{os.getpid()}"
        partial.mkdir(exist_ok=True)
        build_into(partial, wheels)
        os.replace(partial, target)
        print(f"fake CUDA libraries built in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(build(sys.argv[1]))
