"""Settings of low-rank adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarl.config.section import PositiveFloat, PositiveInt, Problems, Section, Text, rule

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the head."""


class LoraLayers(Section):
    """Which layers get an adapter, and how large it is."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    target_modules: list[Text] = Field(default=[ALL_LINEAR], min_length=1)
    """Layers that get an adapter, by PEFT's names: q_proj, v_proj, gate_proj, ..., or [all-linear]."""

    @rule
    def _targets(self) -> Problems:
        names = self.target_modules
        if ALL_LINEAR in names and len(names) > 1:
            yield "target_modules", f"{ALL_LINEAR} stands alone (got {', '.join(names)})"
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            yield "target_modules", f"{name} is named twice"


class LoraConfig(LoraLayers):
    """Train low-rank adapters (LoRA, arXiv:2106.09685) beside frozen weights: W + alpha / rank * B A."""

    alpha: PositiveFloat = 32.0
    """Scale of an adapter, divided by the rank."""
    export: Literal["merged", "adapter", "both"] = "both"
    """At the end: merged weights as <run.dir>/hf, adapters in PEFT's format as <run.dir>/adapter, or both."""
