"""Build kernel files with g++ for the SIMT executor and call their launch functions (see simt.h).

``Kernels("token_logprob_simt.cpp").run("token_logprob", Read(x), Write(y), 3, 0.5)`` calls the extern "C"
function of that name. Arrays are passed as pointers and are the only global memory a kernel may touch; int
becomes int64_t, float double, None a null pointer. A failed check raises :class:`SimtError`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD_DIR = HERE.parents[1] / "build" / "simt"

COMMON_FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-DMEGARL_SIMT",
    f"-I{HERE}",
    f"-I{CSRC}",
    "-Wall",
    "-Wextra",
    "-Werror",
]
CHECKED_FLAGS = [  # each makes the compiler call simt_memory.cpp; no sanitizer library is linked
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift",
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-tsan",
]


class SimtError(AssertionError):
    """A check of the executor failed; the message names kernel, block and thread."""


@dataclass(frozen=True)
class Read:
    """An array that the kernel may only read."""

    array: np.ndarray
    name: str = "input"


@dataclass(frozen=True)
class Write:
    """An array that the kernel may read and write."""

    array: np.ndarray
    name: str = "output"


def _object(source: Path, flags: list[str]) -> Path:
    """Compile ``source`` unless the same preprocessed text was compiled before with the same flags."""
    command = ["g++", *COMMON_FLAGS, *flags]
    text = subprocess.run([*command, "-E", "-P", str(source)], check=True, capture_output=True).stdout
    key = hashlib.sha256(text + " ".join(command).encode()).hexdigest()[:16]
    target = BUILD_DIR / f"{source.stem}-{key}.o"
    if not target.exists():
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=BUILD_DIR, suffix=".o", delete=False) as partial:
            pass
        result = subprocess.run(
            [*command, "-c", str(source), "-o", partial.name], capture_output=True, text=True
        )
        if result.returncode:
            os.unlink(partial.name)
            raise RuntimeError(f"g++ failed on {source.name}:\n{result.stderr}")
        os.replace(partial.name, target)  # another process may do the same; the file appears whole
    return target


def _library(source: Path) -> Path:
    objects = [_object(source, CHECKED_FLAGS)]
    objects += [_object(HERE / name, []) for name in ("simt_runtime.cpp", "simt_memory.cpp")]
    key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = BUILD_DIR / f"{source.stem}-{key}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-o", str(partial), *map(str, objects)], check=True)
        os.replace(partial, target)
    return target


class Kernels:
    """The extern "C" functions of one file in tests/simt, each of which launches kernels."""

    def __init__(self, source: str) -> None:
        if shutil.which("g++") is None:
            pytest.skip("the SIMT executor needs g++")
        self._library = ctypes.CDLL(str(_library(HERE / source)))
        self._library.simt_error.restype = ctypes.c_char_p
        self._library.simt_traffic.restype = ctypes.c_uint64

    def run(self, function: str, *arguments: Read | Write | int | float | None, seed: int = 0) -> None:
        """Launch; ``seed`` determines the order of blocks and threads."""
        library = self._library
        library.simt_seed(ctypes.c_uint64(seed))
        library.simt_forget_buffers()
        values = [self._argument(argument) for argument in arguments]
        if getattr(library, function)(*values):
            raise SimtError(library.simt_error().decode())

    def traffic(self, name: str) -> tuple[int, int]:
        """Return the bytes read from and written to the arrays of that name by the last run."""
        read, written = (self._library.simt_traffic(name.encode(), w) for w in (0, 1))
        return int(read), int(written)

    def _argument(self, argument: Read | Write | int | float | None) -> ctypes._SimpleCData:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, Read | Write):
            self._register(argument.array, argument.name, isinstance(argument, Write))
            return ctypes.c_void_p(argument.array.ctypes.data)
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        return ctypes.c_int64(argument)

    def _register(self, array: np.ndarray, name: str, writable: bool) -> None:
        """Register every contiguous piece: the gap between strided rows stays out of bounds."""
        if array.size and not array.flags.c_contiguous:
            assert array[0].flags.c_contiguous, f"{name}: only the first dimension may be strided"
            for row in array:
                self._register(row, name, writable)
            return
        self._library.simt_register(
            name.encode(), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), int(writable)
        )


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), round to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "float64": np.float64}


def stored(values: np.ndarray, dtype: str, *, padding: int = 0, offset: int = 0) -> np.ndarray:
    """``values`` as a kernel's ``dtype``; a matrix as a view with ``offset``, ``padding`` around its rows."""
    narrow = to_bfloat16(values) if dtype == "bfloat16" else values.astype(STORAGE[dtype])
    if values.ndim == 1:
        return narrow
    columns = values.shape[1]
    buffer = np.full((len(values), offset + columns + padding), 7, STORAGE[dtype])
    buffer[:, offset : offset + columns] = narrow
    return buffer[:, offset : offset + columns]


def widened(array: np.ndarray) -> np.ndarray:
    """float64 values of a stored array (uint16 holds bfloat16)."""
    return (from_bfloat16(array) if array.dtype == np.uint16 else array).astype(np.float64)
