"""The environment variables that give a process, and all it starts, fake GPUs.

``environment(python)`` is for tests; ``python tests/fake_cuda/activate.py PYTHON`` prints lines for eval.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fake_cuda.build import HERE, ROOT, build


def cuda_python() -> Path:
    """Return the python of the environment with torch for CUDA: MEGARL_CUDA_ENV, or the set-up's default."""
    return Path(os.environ.get("MEGARL_CUDA_ENV", ROOT / ".setup" / "cuda-env" / "bin" / "python"))


def environment(
    python: str, session: Path, *, devices: int = 2, memory_gb: float = 4.0, **settings: str
) -> dict[str, str]:
    """Variables for a process of ``python``'s environment; the libraries are built where missing.

    ``session`` is a directory in /dev/shm that the processes of one run share; ``settings`` go in as well.
    """
    libraries = build(python)
    inherited = os.environ.get("PYTHONPATH")
    return {
        "FAKECUDA": "1",
        "FAKECUDA_LIB": str(libraries),
        "FAKECUDA_KERNELS": str(libraries / "libfakecuda_megarl.so"),
        "FAKECUDA_SESSION": str(session),
        "FAKECUDA_DEVICES": str(devices),
        "FAKECUDA_MEMORY_GB": str(memory_gb),
        "FAKECUDA_STRICT": "1",
        "LD_PRELOAD": str(libraries / "libfakecuda_preload.so"),
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), *([inherited] if inherited else [])]),
        "TRITON_INTERPRET": "1",  # its compiler needs a card to ask for its capability
        "TRITON_LIBCUDA_PATH": str(libraries),
        # FlashInfer's kernels are compiled when first used.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
        **settings,
    }


@dataclass(frozen=True)
class Session:
    """What the processes of one run left in their directory."""

    path: Path

    def skipped(self) -> set[str]:
        """Kernels and operators that were skipped, and whose results nothing computed, in any process."""
        return {line for file in self.path.glob("skipped.*") for line in file.read_text().splitlines()}

    def counts(self) -> dict[str, int]:
        """Calls of all processes that have ended, by name."""
        total: dict[str, int] = {}
        for file in self.path.glob("report.*"):
            for line in file.read_text().splitlines():
                count, name = line.split(" ", 1)
                total[name] = total.get(name, 0) + int(count)
        return total


@contextlib.contextmanager
def session(parent: Mapping[str, str] = os.environ) -> Iterator[Session]:
    """A directory for the processes of one run, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="fakecuda-", dir=parent.get("FAKECUDA_SHM", "/dev/shm")))
    try:
        yield Session(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    directory = Path(tempfile.mkdtemp(prefix="fakecuda-", dir="/dev/shm"))
    for name, value in environment(sys.argv[1], directory).items():
        print(f"export {name}={shlex.quote(value)}")
