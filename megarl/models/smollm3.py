"""SmolLM3: Llama whose every fourth layer has no rotary embedding (NoPE: arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megarl.errors import UserError
from megarl.models.dense import dense_architecture
from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture


def architecture(config: dict[str, Any]) -> Architecture:
    """Return the table for ``model_type: smollm3``; UserError for a list of layers that does not fit.

    It has no places in an engine: vLLM runs the model through transformers and loads it by its own names.
    """
    bias = bool(config.get("attention_bias", False))
    spec = ModelSpec.from_hf(
        "smollm3",
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        unrotated_layers=_unrotated(config),
    )
    table = dense_architecture(spec)
    return replace(table, rules=tuple(replace(rule, engine=()) for rule in table.rules))


def _unrotated(config: dict[str, Any]) -> tuple[int, ...]:
    """Layers without rotary embedding, which ``no_rope_layers`` marks by 0."""
    count, marks = config["num_hidden_layers"], config.get("no_rope_layers")
    if marks is None:
        interval = config["no_rope_layer_interval"]
        if type(interval) is not int or interval < 1:
            raise UserError(
                f"config.json: no_rope_layer_interval must be a whole number above 0 (got {interval!r})"
            )
        return tuple(range(interval - 1, count, interval))
    if not isinstance(marks, list) or len(marks) != count or any(mark not in (0, 1) for mark in marks):
        raise UserError(
            f"config.json: no_rope_layers must have a 0 or 1 for each of {count} layers (got {marks!r})"
        )
    return tuple(layer for layer, mark in enumerate(marks) if not mark)
