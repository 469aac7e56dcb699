"""The activation of a gated MLP with the constructor that Megatron's MLP calls."""

from __future__ import annotations

from typing import Any

import torch

from megarl.trainer.fused import swiglu


class SwiGlu(torch.nn.Module):
    """:func:`megarl.trainer.fused.swiglu` as a module."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See :func:`swiglu`."""
        return swiglu(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return no state; Megatron's MLP asks every submodule."""
        return {}
