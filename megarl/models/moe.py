"""Rules of mixture-of-experts layers.

Experts are stacked as in the engine, w13 [E, 2I, H] (gate, then up) and w2 [E, H, I], so that the experts of
a rank are two parameters per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.models.spec import ModelSpec
from megarl.models.table import Place, Rule, Slot

_MEGATRON = "decoder.layers.{layer}.mlp."


@dataclass(frozen=True, slots=True)
class MoeNames:
    """A family's names for the parts of its MoE block; ``block`` is also the engine's prefix."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def moe_mlp(spec: ModelSpec, names: MoeNames = MoeNames()) -> list[Rule]:
    """Return rules for router, experts and shared experts of the layers with experts."""
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None
    block = f"model.layers.{{layer}}.{names.block}."
    inner = moe.intermediate_size
    slots = (Slot(inner), Slot(inner))
    rules = [
        Rule(
            f"{block}gate.weight",
            (moe.num_experts, hidden),
            (Place(f"{_MEGATRON}router.weight"),),
            (Place(f"{block}gate.weight"),),
            moe.layers,
        )
    ]
    if moe.router_bias:
        rules.append(
            Rule(
                f"{block}gate.e_score_correction_bias",
                (moe.num_experts,),
                (Place(f"{_MEGATRON}router.expert_bias"),),
                (Place(f"{block}gate.e_score_correction_bias"),),
                moe.layers,
            )
        )
    stacked = f"{block}experts.routed_experts."
    rules += [
        Rule(
            f"{block}experts.{{expert}}.{name}.weight",
            (inner, hidden),
            (Place(f"{_MEGATRON}experts.w13", dim=0, slots=slots, slot=slot, expert=True),),
            (Place(f"{stacked}w13_weight", dim=0, slots=slots, slot=slot, expert=True),),
            moe.layers,
        )
        for slot, name in enumerate((names.gate, names.up))
    ]
    rules.append(
        Rule(
            f"{block}experts.{{expert}}.{names.down}.weight",
            (hidden, inner),
            (Place(f"{_MEGATRON}experts.w2", dim=1, expert=True),),
            (Place(f"{stacked}w2_weight", dim=1, expert=True),),
            moe.layers,
        )
    )
    if moe.shared_intermediate_size:
        rules += _shared_experts(spec, block)
    return rules


def _shared_experts(spec: ModelSpec, block: str) -> list[Rule]:
    moe, hidden = spec.moe, spec.hidden_size
    assert moe is not None
    inner = moe.shared_intermediate_size
    slots = (Slot(inner), Slot(inner))
    rules = [
        Rule(
            f"{block}shared_experts.{name}_proj.weight",
            (inner, hidden),
            (Place(f"{_MEGATRON}shared_experts.linear_fc1.weight", dim=0, slots=slots, slot=slot),),
            (Place(f"{block}shared_experts.gate_up_proj.weight", dim=0, slots=slots, slot=slot),),
            moe.layers,
        )
        for slot, name in enumerate(("gate", "up"))
    ]
    rules.append(
        Rule(
            f"{block}shared_experts.down_proj.weight",
            (hidden, inner),
            (Place(f"{_MEGATRON}shared_experts.linear_fc2.weight", dim=1),),
            (Place(f"{block}shared_experts.down_proj.weight", dim=1),),
            moe.layers,
        )
    )
    return rules
