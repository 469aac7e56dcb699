"""RMS norm with the constructor Megatron's layers call."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.trainer.fused import rms_norm


class RmsNorm(torch.nn.RMSNorm):
    """RMS norm with Megatron's constructor; marks its weight for sequence-parallel gradient reduction."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self._eps)
