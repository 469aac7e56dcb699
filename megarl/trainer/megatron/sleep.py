"""The trainer's memory while engines generate: gradients freed, optimizer state in host memory.

Gradient buffers shrink to nothing by Megatron's own means: their storages are resized, every view stays
valid. Megatron's way of moving the optimizer is not used: without master weights it would move the
parameters themselves, which engines alias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

PARTS = ("gradients", "optimizer")


class Sleeper:
    """Puts parts of one rank's trainer to sleep and wakes them."""

    def __init__(self, ddp: list[Any], optimizer: Any, device: torch.device) -> None:
        self._ddp, self._optimizer, self._device = ddp, optimizer, device
        self._asleep: frozenset[str] = frozenset()
        self._moved: list[Callable[[], None]] = []  # each brings one tensor back

    def sleep(self, parts: Iterable[str]) -> None:
        """Give up the memory of ``parts``; those asleep already stay so."""
        parts = frozenset(parts) - self._asleep
        assert parts <= set(PARTS), parts
        on_gpu = self._device.type == "cuda"
        if "gradients" in parts:
            for chunk in self._ddp:
                chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=False)
        if "optimizer" in parts:
            self._move_optimizer()
        if on_gpu and parts:
            torch.cuda.empty_cache()  # the engine's allocator is another process's
        self._asleep |= parts

    def wake(self) -> None:
        """Bring back what sleeps. Gradients are zero then."""
        for bring_back in self._moved:
            bring_back()
        self._moved.clear()
        if "gradients" in self._asleep:
            for chunk in self._ddp:
                chunk.restore_grad_buffers(synchronize=self._device.type == "cuda")
        self._asleep = frozenset()

    def _move_optimizer(self) -> None:
        params = {id(param) for chunk in self._ddp for param in chunk.parameters()}
        for megatron in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = megatron.optimizer
            for group in inner.param_groups:
                for master in group["params"]:
                    if id(master) not in params:
                        self._move(master.data, partial(setattr, master, "data"))
            for state in inner.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        self._move(value, partial(state.__setitem__, name))

    def _move(self, tensor: torch.Tensor, put: Callable[[torch.Tensor], None]) -> None:
        """Put a copy in pinned host memory in its place; what lies on the host stays where it is."""
        device = tensor.device
        if device.type == "cpu":
            return
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        on_host.copy_(tensor)
        put(on_host)
        self._moved.append(lambda: put(on_host.to(device, non_blocking=True)))
