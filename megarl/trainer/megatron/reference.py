"""A frozen copy of a rank's parameters that can be swapped in for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class FrozenCopy(dict[str, torch.Tensor]):
    """A copy of the parameters, by name."""

    def __init__(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__({name: param.detach().clone() for name, param in params.items()})

    @contextmanager
    def in_place_of(self, params: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
        """Inside, the model computes with this copy: storage pointers are swapped, nothing is moved."""
        self._exchange(params)
        try:
            yield
        finally:
            self._exchange(params)

    def _exchange(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        for name, param in params.items():
            param.data, self[name] = self[name], param.data
