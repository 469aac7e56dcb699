"""The trainer's side of the hand-over on a CPU: its parameters in shared memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megarl.models.table import Region
from megarl.weights.handover import SharedStorage, SourceView
from megarl.weights.plan import Owner


def pool_parameters(params: Mapping[str, torch.nn.Parameter]) -> torch.Tensor:
    """Move all parameters into one flat buffer, so that there is one handle to share.

    Values stay as they are; each parameter becomes a view, aligned to 64 bytes. Must run before an
    optimizer or a gradient buffer looks at the parameters. Parameters that share storage are not
    expected (tied ones are one Parameter).
    """
    align = 64
    offsets, end = {}, 0
    for name, param in params.items():
        offsets[name] = end
        end += -(-param.numel() * param.element_size() // align) * align
    some = next(iter(params.values()))
    buffer = torch.zeros(end // some.element_size(), dtype=some.dtype, device=some.device)
    with torch.no_grad():
        for name, param in params.items():
            assert param.dtype == some.dtype, "one type for all parameters"
            start = offsets[name] // some.element_size()
            view = buffer[start : start + param.numel()].view(param.shape)
            view.copy_(param)
            param.data = view
    return buffer


def share_parameters(params: Mapping[str, torch.Tensor], regions: list[Region]) -> Owner:
    """Put the parameters' storages into shared memory (in place: all views stay valid) and describe them."""
    storages: list[SharedStorage] = []
    numbers: dict[int, int] = {}
    views = {}
    for name, param in params.items():
        storage = param.untyped_storage()
        if not storage.is_shared():
            storage._share_filename_cpu_()
        key = storage.data_ptr()
        if key not in numbers:
            numbers[key] = len(storages)
            storages.append(SharedStorage(tuple(storage._share_filename_cpu_())))
        views[name] = SourceView(
            numbers[key],
            str(param.dtype).removeprefix("torch."),
            int(param.storage_offset()),
            tuple(param.shape),
            tuple(param.stride()),
        )
    return Owner(regions, views, storages)
