"""Settings of LoRA adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarl.config.section import PositiveFloat, PositiveInt, Problems, Section, Text, rule

ALL_LINEAR = "all-linear"
"""PEFT's name for all linear layers except the head."""


class LoraLayers(Section):
    """Target layers and rank of the adapters."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    target_modules: list[Text] = Field(default=[ALL_LINEAR], min_length=1)
    """Layers to adapt, by PEFT's names: q_proj, v_proj, gate_proj, ..., or [all-linear]."""

    @rule
    def _targets(self) -> Problems:
        """`target_modules` is [all-linear], or names without repetition."""
        names = self.target_modules
        if ALL_LINEAR in names and len(names) > 1:
            yield "target_modules", f"{ALL_LINEAR} excludes other names (got {', '.join(names)})"
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            yield "target_modules", f"{name} is listed twice"


class LoraConfig(LoraLayers):
    """Train low-rank adapters (LoRA, arXiv:2106.09685) on frozen weights: W + alpha / rank * B A."""

    alpha: PositiveFloat = 32.0
    """Scale of the adapter; it is divided by the rank."""
    export: Literal["merged", "adapter", "both"] = "both"
    """Final export: merged weights in <run.dir>/hf, PEFT adapters in <run.dir>/adapter, or both."""
