"""Layers with LoRA adapters (Hu et al. 2021, arXiv:2106.09685), and their names.

Derived from the architecture table: an adapter belongs to a Hugging Face projection, although the trainer may
fuse several in one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from megarl.config.lora import ALL_LINEAR, LoraLayers
from megarl.errors import UserError
from megarl.models.table import Architecture, Region, Rule

Matrix = Literal["A", "B"]
_SUFFIX = "_proj.weight"


def check_lora(architecture: Architecture, lora: LoraLayers | None, section: str = "lora") -> None:
    """Raise UserError for a model or layers without adapters; ``section`` is the configuration key."""
    if lora is None:
        return
    spec, field = architecture.spec, f"{section}.target_modules"
    if spec.mla is not None:
        raise UserError(
            f"{section}: {spec.family} has latent attention, whose projections have no adapters yet"
        )
    names, asked = possible_targets(architecture), lora.target_modules
    listed = ", ".join(names)
    if spec.moe is not None and asked == [ALL_LINEAR]:
        raise UserError(f"{field}: {ALL_LINEAR}, but experts have no adapters yet; choose among {listed}")
    unknown = [name for name in asked if name not in (*names, ALL_LINEAR)]
    if unknown:
        why = " (experts have no adapters yet)" if spec.moe is not None else ""
        raise UserError(f"{field}: {', '.join(unknown)} cannot have adapters, {listed} can{why}")


def possible_targets(architecture: Architecture) -> list[str]:
    """Return PEFT's names of the projections that can have adapters, in table order."""
    with_experts = {_name(rule) for rule in architecture.rules if _is_of_experts(rule)}
    names = (_name(rule) for rule in architecture.rules if rule.hf.endswith(_SUFFIX))
    return list(dict.fromkeys(name for name in names if name not in with_experts))


def targets_of(architecture: Architecture, lora: LoraLayers) -> list[str]:
    """Return the projections that get adapters, all-linear resolved, in table order."""
    names = possible_targets(architecture)
    return [name for name in names if name in lora.target_modules or lora.target_modules == [ALL_LINEAR]]


def adapted_modules(architecture: Architecture, lora: LoraLayers) -> dict[str, tuple[int, int]]:
    """Return Hugging Face module with an adapter -> (outputs, inputs)."""
    targets = set(targets_of(architecture, lora))
    found = {}
    for name, shape in architecture.hf_shapes().items():
        module = name.removesuffix(".weight")
        if name.endswith(_SUFFIX) and module.rpartition(".")[2] in targets:
            found[module] = (shape[0], shape[1])
    return found


def adapter_shapes(modules: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Return the tensors of the adapters in PEFT's format -> shape."""
    shapes = {}
    for module, (outputs, inputs) in modules.items():
        shapes[peft_name(module, "A")] = (rank, inputs)
        shapes[peft_name(module, "B")] = (outputs, rank)
    return shapes


def num_adapter_parameters(modules: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Return the number of elements of all adapters."""
    return sum(rank * (outputs + inputs) for outputs, inputs in modules.values())


def local_elements(
    architecture: Architecture, lora: LoraLayers, regions: Iterable[Region]
) -> tuple[int, int]:
    """Return the elements of a rank's adapters and of the weights they adapt; the rank holds ``regions``."""
    targets = targets_of(architecture, lora)
    adapters = weights = 0
    for region in regions:
        if module_of(region.hf, targets) is not None:
            outputs, inputs = (stop - start for start, stop in region.box)
            adapters += lora.rank * (outputs + inputs)
            weights += outputs * inputs
    return adapters, weights


def peft_name(module: str, matrix: Matrix) -> str:
    """Return PEFT's name of a matrix in adapter_model.safetensors."""
    return f"base_model.model.{module}.lora_{matrix}.weight"


def module_of(hf_tensor: str, targets: Iterable[str]) -> str | None:
    """Return the adapted module of a weight; None if it has no adapter."""
    module = hf_tensor.removesuffix(".weight")
    is_weight = module != hf_tensor
    return module if is_weight and module.rpartition(".")[2] in set(targets) else None


def _name(rule: Rule) -> str:
    return rule.hf.removesuffix(".weight").rpartition(".")[2]


def _is_of_experts(rule: Rule) -> bool:
    return "{expert}" in rule.hf or ".shared_experts." in rule.hf
