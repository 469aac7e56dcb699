"""A trainer's memory on one rank, by part."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megarl.platform.memory import storage_bytes


def parts_in_memory(
    device: torch.device, *, parameters: Iterable[torch.Tensor], **parts: Iterable[torch.Tensor]
) -> dict[str, int]:
    """Return the bytes of each part on ``device``, without empty parts.

    A part that is made of the parameters' own storages, such as float32 master weights, has none of its own.
    """
    parameters = list(parameters)
    sizes = {"parameters": storage_bytes(parameters, device.type)}
    sizes |= {name: storage_bytes(tensors, device.type, parameters) for name, tensors in parts.items()}
    return {name: size for name, size in sizes.items() if size}
