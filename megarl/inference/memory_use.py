"""Memory of an engine rank's process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megarl.inference.interface import EngineMemory
from megarl.inference.streamed_weights import StreamedWeights
from megarl.inference.weight_receiver import AttachedWeights
from megarl.platform.memory import resident_bytes, storage_bytes


def engine_memory(
    params: Mapping[str, torch.Tensor],
    attached: AttachedWeights | StreamedWeights | None,
    kv_caches: Any,
    device: torch.device,
) -> EngineMemory:
    """Return the memory of this process, whose model has ``params`` on ``device``.

    ``kv_caches`` are tensors in lists, tuples and dicts, nested as they come.
    """
    aliases = attached.aliases if isinstance(attached, AttachedWeights) else []
    aliased = {alias.param for alias in aliases}
    own = [param for name, param in params.items() if name not in aliased]
    return EngineMemory(
        parameters=storage_bytes(own, device.type, [params[name] for name in aliased]),
        kv_cache=storage_bytes(tensors_in(kv_caches), device.type),
        allocated=torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        resident=resident_bytes(),
    )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor inside a cache, of whatever class of transformers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif type(value).__module__.startswith("transformers."):
        yield from tensors_in(getattr(value, "__dict__", {}))
