"""Mistral 7B from v0.2 on and what shares its architecture (Nemo, ...): Llama, its sliding window off."""

from __future__ import annotations

from typing import Any

from megarl.errors import UserError
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Table for ``model_type: mistral``; UserError for a window that would hide tokens."""
    window, longest = config["sliding_window"], config["max_position_embeddings"]
    if window is not None and window < longest:
        raise UserError(
            f"config.json: sliding_window {window} is not supported for mistral, it would hide tokens: built "
            f"is null, or a window of at least max_position_embeddings (got {longest})"
        )
    return dense_architecture(ModelSpec.from_hf("mistral", config))
