"""Memory of a trainer rank by part, and of the processes beside it, measured at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megarl import platform
from megarl.platform.memory import resident_bytes
from megarl.trainer.interface import Checkpointable

_GIB = 2**30


class MemoryMeter:
    """The memory of this rank's trainer and of processes on its host."""

    def __init__(self) -> None:
        self._parts: dict[str, int] = {}
        self._watched: dict[str, Callable[[], Iterable[int]]] = {}

    def watch(self, name: str, pids: Callable[[], Iterable[int]]) -> None:
        """Measure the processes of this host that ``pids`` returns, together, as ``name``."""
        self._watched[name] = pids

    def measure(self, trained: Checkpointable) -> None:
        """Measure the trainer's parts now, while none of them sleeps."""
        self._parts = trained.memory_bytes()

    def read(self) -> dict[str, int]:
        """Return bytes by name: the parts as last measured, the rest of the peak, and the processes now.

        On a GPU "activations" is what torch had allocated at its peak beside the parts: activations, gathered
        weights, temporary buffers. On a CPU "other" is the rest of the peak of resident memory, libraries
        included.
        """
        peak, (allocated, reserved) = round(platform.peak_memory_gib() * _GIB), platform.allocated_bytes()
        on_gpu = platform.current().name == "cuda"
        found = dict(self._parts)
        found["activations" if on_gpu else "other"] = max(peak - sum(self._parts.values()), 0)
        if on_gpu:
            found |= {"allocated": allocated, "reserved": reserved}
        found["resident"] = resident_bytes()
        for name, pids in self._watched.items():
            found[f"{name}_resident"] = sum(map(resident_bytes, pids()))
        return found


def as_metrics(sizes: dict[str, int]) -> dict[str, float]:
    """Return the metrics of bytes by name: memory_<name>_gib."""
    return {f"memory_{name}_gib": size / _GIB for name, size in sizes.items()}
