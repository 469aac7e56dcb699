"""Load megarl._C, which registers torch.ops.megarl.*, or report what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
import sys
from pathlib import Path

import torch

import megarl

_MARK = re.compile(rb"MEGARL_CPU_CAPABILITY=([A-Z0-9]+)\0")
_WIDTHS = ["DEFAULT", "AVX2", "AVX512"]
# Built for this machine, or one of a wheel's, the widest first.
_MODULES = ("_C", "_C_avx512", "_C_avx2")


class NativeOpsUnavailable(ImportError):
    """megarl._C is not built, was built for another torch, or for a CPU this machine does not have."""


def load_native() -> None:
    """Import the extension as megarl._C: the one built here, or the widest of a wheel that this CPU runs.

    Raises NativeOpsUnavailable, naming the cause and the cure, before any instruction that the
    machine lacks is executed.
    """
    if "megarl._C" in sys.modules:
        return
    present = torch.backends.cpu.get_cpu_capability()
    needed = {}
    for name in _MODULES:
        spec = importlib.util.find_spec(f"megarl.{name}")
        if spec is not None and spec.origin is not None:
            needed[name] = _vector_instructions_of(Path(spec.origin))
    fitting = [name for name, width in needed.items() if _runs_on(present, width)]
    if not needed:
        raise NativeOpsUnavailable("megarl._C, the native ops, is not built; `make setup` builds it")
    if not fitting:
        raise NativeOpsUnavailable(
            f"megarl._C was built for {' and '.join(needed.values())} instructions, this machine has "
            f"{present}; `make setup` on this machine rebuilds it"
        )
    try:
        module = importlib.import_module(f"megarl.{fitting[0]}")
    except ImportError as error:
        raise NativeOpsUnavailable(
            f"megarl.{fitting[0]} does not load with torch {torch.__version__} ({error}); "
            "`make setup` rebuilds it"
        ) from error
    sys.modules["megarl._C"] = megarl._C = module


def _runs_on(present: str, needed: str) -> bool:
    if needed not in _WIDTHS:
        return True
    return present in _WIDTHS and _WIDTHS.index(needed) <= _WIDTHS.index(present)


def _vector_instructions_of(library: Path) -> str:
    """Return the vector instructions a built extension needs, read from the file without loading it."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found = _MARK.search(view)
        return found.group(1).decode() if found else "DEFAULT"
