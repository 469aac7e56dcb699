"""Loads megarl._C, which registers torch.ops.megarl.*, or says what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
from pathlib import Path

import torch

_MARK = re.compile(rb"MEGARL_CPU_CAPABILITY=([A-Z0-9]+)\0")
_WIDTHS = ["DEFAULT", "AVX2", "AVX512"]


class NativeOpsUnavailable(ImportError):
    """megarl._C is not built, was built for another torch, or for a CPU this machine does not have."""


def load_native() -> None:
    """Import megarl._C.

    Raises NativeOpsUnavailable, naming the cause and the cure, before any instruction that the
    machine lacks is executed.
    """
    spec = importlib.util.find_spec("megarl._C")
    if spec is None or spec.origin is None:
        raise NativeOpsUnavailable("megarl._C, the native ops, is not built; `make setup` builds it")
    needed = _built_for(Path(spec.origin))
    present = torch.backends.cpu.get_cpu_capability()
    if needed in _WIDTHS and (present not in _WIDTHS or _WIDTHS.index(needed) > _WIDTHS.index(present)):
        raise NativeOpsUnavailable(
            f"megarl._C was built for {needed} instructions, this machine has {present}; "
            "`make setup` on this machine mends it"
        )
    try:
        importlib.import_module("megarl._C")
    except ImportError as error:
        raise NativeOpsUnavailable(
            f"megarl._C does not load beside torch {torch.__version__} ({error}); `make setup` rebuilds it"
        ) from error


def _built_for(library: Path) -> str:
    """The vector instructions a built extension needs, read from the file without loading it."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found = _MARK.search(view)
        return found.group(1).decode() if found else "DEFAULT"
