"""Release the trainer's memory while engines generate: gradients freed, optimizer state in host memory.

Gradient buffers shrink by Megatron's own means: their storages are resized to 0, every view stays valid.
Megatron's offloading of the optimizer is not used: without master weights it would move the parameters
themselves, which engines alias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from megarl.trainer.host_copies import HostCopies, Put

PARTS = ("gradients", "optimizer")


class Sleeper:
    """Put parts of one rank's trainer to sleep and wake them."""

    def __init__(self, ddp: list[Any], optimizer: Any, device: torch.device) -> None:
        self._ddp, self._optimizer, self._copies = ddp, optimizer, HostCopies(device)
        self._on_gpu = device.type == "cuda"
        self._asleep: frozenset[str] = frozenset()

    def sleep(self, parts: Iterable[str]) -> None:
        """Release the memory of ``parts``; no effect on those asleep."""
        parts = frozenset(parts) - self._asleep
        assert parts <= set(PARTS), parts
        if "gradients" in parts:
            for chunk in self._ddp:
                chunk.offload_grad_buffers(synchronize=self._on_gpu, empty_cache=False)
        if "optimizer" in parts:
            self._copies.move(self._tensors())
        if self._on_gpu and parts:
            torch.cuda.empty_cache()  # the engine allocates in another process
        self._asleep |= parts

    def wake(self) -> None:
        """Restore what sleeps; gradients are zero."""
        self._copies.move_back()
        if "gradients" in self._asleep:
            for chunk in self._ddp:
                chunk.restore_grad_buffers(synchronize=self._on_gpu)
        self._asleep = frozenset()

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """Yield master parameters and optimizer state, wherever they are now."""
        return (tensor for _, tensor, _ in self._tensors())

    def _tensors(self) -> Iterator[tuple[tuple[int, str], torch.Tensor, Put]]:
        """Yield master parameters and optimizer state: a stable key, the tensor, and its setter."""
        params = {id(param) for chunk in self._ddp for param in chunk.parameters()}
        for megatron in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = megatron.optimizer
            for group in inner.param_groups:
                for master in group["params"]:
                    if id(master) not in params:
                        yield (id(master), "master"), master.data, partial(setattr, master, "data")
            for owner, state in inner.state.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        yield (id(owner), name), value, partial(state.__setitem__, name)
