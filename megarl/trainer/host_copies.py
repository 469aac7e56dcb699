"""Release tensors' device memory for a while by replacing them with copies in host memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from megarl.platform.memory import wait_for

Put = Callable[[torch.Tensor], None]


class HostCopies:
    """Moves tensors to the host and back; host memory is page-locked and reused, since pinning is slow."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: dict[Hashable, torch.Tensor] = {}
        self._moved: list[tuple[Put, torch.Tensor]] = []  # setter of each tensor, and its host copy

    def move(self, tensors: Iterable[tuple[Hashable, torch.Tensor, Put]]) -> None:
        """Replace tensors by host copies; each has a stable key and a setter.

        The copies run concurrently.
        """
        for key, tensor, put in tensors:
            if tensor.device.type != self._device.type:  # a step counter on the host
                continue
            on_host = self._host.get(key)
            if on_host is None or (on_host.shape, on_host.dtype) != (tensor.shape, tensor.dtype):
                on_host = torch.empty_like(tensor, device="cpu", pin_memory=self._device.type == "cuda")
                self._host[key] = on_host
            on_host.copy_(tensor, non_blocking=True)
            self._moved.append((put, on_host))
        wait_for(self._device)
        for put, on_host in self._moved:
            put(on_host)

    def move_back(self) -> None:
        """Undo :meth:`move` in stream order: later kernels wait for the copies, the host does not."""
        for put, on_host in self._moved:
            put(on_host.to(self._device, non_blocking=True, copy=True))
        self._moved.clear()
