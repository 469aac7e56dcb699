"""``quantization_config`` of config.json: FP8 with block scales can be read, everything else cannot."""

from __future__ import annotations

from typing import Any

SCALE = "_scale_inv"
"""Ending of the scales' name: those of ``x.weight`` are ``x.weight_scale_inv``."""
_FORMATS = (None, "e4m3")


def fp8_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale; None if the weights are not stored so."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or quantization.get("fmt") not in _FORMATS:
        return None
    rows, columns = block
    whole = type(rows) is int and type(columns) is int
    return (rows, columns) if whole and min(rows, columns) > 0 else None


def quantization_problem(config: dict[str, Any]) -> str | None:
    """Why the weights cannot be read; None if they can."""
    quantization = config.get("quantization_config")
    if quantization is None or fp8_block(config) is not None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    return (
        f"quantization_config ({method}) is not supported, but for fp8 with weight_block_size and fmt e4m3; "
        "where the weights have been dequantised, take the key out of the file"
    )
