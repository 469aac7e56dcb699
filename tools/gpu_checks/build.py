"""Build the extension for this GPU with the local toolkit, and check what it registers.

A toolkit may be nvcc alone: then the headers and libcudart come from the wheels of torch. If the build fails,
an extension in the folder of the wheels is used, so the other steps can run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from gpu_checks.report import Report

ROOT = Path(__file__).resolve().parents[2]
STAMP = ROOT / "build" / "gpu_check.stamp"  # fingerprint of the last build; ignored by git
MOST_JOBS = 16


def run(report: Report) -> None:
    """Build if the sources have changed since this script last built them here."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}"
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    target, stamp = ROOT / "megarl" / name, _fingerprint(torch.__version__, arch)
    report.figure("arch", arch)
    begin, how = time.monotonic(), "built"
    if target.is_file() and STAMP.is_file() and STAMP.read_text() == stamp:
        how = "built before"
    elif _build(arch):
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(stamp)
    else:
        report.problem("setup.py build_ext failed: log.txt says why")
        brought = report.wheels / name if report.wheels else target
        if brought == target or not brought.is_file():
            target.unlink(missing_ok=True)  # of other sources, or for another GPU
            return
        shutil.copy(brought, target)
        how = f"taken from {brought.parent}"
    report.figure("build_s", time.monotonic() - begin)
    names, without = _registered()
    report.figure("ops", names)
    report.check(bool(names), "the extension registers no ops")
    report.check(not without, f"no CUDA kernel: {', '.join(without)}")
    report.summary(f"{how} for sm_{arch.replace('.', '')}, {len(names)} ops with CUDA kernels")


def _fingerprint(torch_version: str, arch: str) -> str:
    """Return the fingerprint of everything the build depends on."""
    digest = hashlib.sha256(f"{torch_version} {arch} {sys.version}".encode())
    for path in sorted([ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build(arch: str) -> bool:
    """Run ``setup.py build_ext --inplace``; return True on success."""
    with tempfile.TemporaryDirectory() as work:
        env = os.environ | {
            "FORCE_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": arch,
            "MAX_JOBS": str(min(MOST_JOBS, len(os.sched_getaffinity(0)))),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        home = toolkit()
        if home is not None:
            env["CUDA_HOME"] = str(home)
        for variable, paths in missing_parts(home, Path(work)).items():
            env[variable] = os.pathsep.join([*paths, *filter(None, [env.get(variable)])])
            print(variable, env[variable], flush=True)
        return (
            subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=env
            ).returncode
            == 0
        )


def toolkit() -> Path | None:
    """Return nvcc's toolkit. ``nvcc`` may be a script elsewhere, whose directory torch would use instead."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    if shutil.which("nvcc") is None:
        return None
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", os.devnull]
    top = re.search(r"TOP=(\S+)", subprocess.run(command, capture_output=True, text=True).stderr)
    return Path(top[1]).resolve() if top else None


def missing_parts(home: Path | None, work: Path) -> dict[str, list[str]]:
    """Return search paths for parts that only torch's wheels have: CUDA's headers, libcudart to link."""
    found: dict[str, list[str]] = {}
    roots = [Path(path) for path in sys.path if path]
    wheels = [part for root in roots for part in root.glob("nvidia/cu1*") if part.is_dir()]
    if home is None or not (home / "include" / "cuda_runtime.h").is_file():
        found["CPATH"] = [str(part / "include") for part in wheels if (part / "include").is_dir()]
    linkable = [] if home is None else [*home.glob("lib64/libcudart.so"), *home.glob("lib/libcudart.so")]
    runtimes = sorted(library for part in wheels for library in part.glob("lib/libcudart.so.*"))
    if not linkable and runtimes:
        (work / "libcudart.so").symlink_to(runtimes[-1])
        found["LIBRARY_PATH"] = [str(work)]
    return found


def _registered() -> tuple[list[str], list[str]]:
    """Return the names of the ops that run on a GPU, and of those that run on a CPU only."""
    import torch

    import megarl.ops

    assert megarl.ops
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("megarl::"))
    on_gpu = [n for n in names if has(n, "CUDA") or has(n, "CompositeExplicitAutograd")]
    return on_gpu, [n for n in names if has(n, "CPU") and n not in on_gpu]
