"""Rules of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) and the norms around it.

Hidden states are projected down to a latent of q (if q has a rank) and a latent of k and v with the rotary
part of k; both are replicated on every tensor rank, as in Transformer Engine's duplicated linear layers and
vLLM. The up-projections are split by head. vLLM fuses the two down-projections if q has a rank.
"""

from __future__ import annotations

from megarl.models.spec import ModelSpec
from megarl.models.table import Place, Rule, Slot

_HF = "model.layers.{layer}."
_SELF = "model.layers.{layer}.self_attn."
_MEGATRON = "decoder.layers.{layer}."
_MEGATRON_SELF = "decoder.layers.{layer}.self_attention."


def latent_attention(spec: ModelSpec) -> list[Rule]:
    """Return rules for attention and the norms before it and before the MLP, in every layer."""
    mla, hidden, heads = spec.mla, spec.hidden_size, spec.num_heads
    assert mla is not None
    q_head = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    kv_head = mla.qk_nope_head_dim + mla.v_head_dim
    kv_down = mla.kv_lora_rank + mla.qk_rope_head_dim
    rules = [
        _whole("input_layernorm", "input_layernorm", (hidden,)),
        _whole("post_attention_layernorm", "pre_mlp_layernorm", (hidden,)),
        _whole("self_attn.kv_a_layernorm", "self_attention.kv_layernorm", (mla.kv_lora_rank,)),
        _by_head("kv_b_proj", "linear_kv_up_proj", (heads * kv_head, mla.kv_lora_rank), 0, kv_head),
        _by_head("o_proj", "linear_proj", (hidden, heads * mla.v_head_dim), 1, mla.v_head_dim),
    ]
    if mla.q_lora_rank is None:
        return [
            *rules,
            _by_head("q_proj", "linear_q_proj", (heads * q_head, hidden), 0, q_head),
            _whole("self_attn.kv_a_proj_with_mqa", "self_attention.linear_kv_down_proj", (kv_down, hidden)),
        ]
    slots = (Slot(mla.q_lora_rank), Slot(kv_down))
    down = (("q_a_proj", "linear_q_down_proj"), ("kv_a_proj_with_mqa", "linear_kv_down_proj"))
    return [
        *rules,
        _whole("self_attn.q_a_layernorm", "self_attention.q_layernorm", (mla.q_lora_rank,)),
        _by_head("q_b_proj", "linear_q_up_proj", (heads * q_head, mla.q_lora_rank), 0, q_head),
        *(
            Rule(
                f"{_SELF}{hf}.weight",
                (slots[slot].size, hidden),
                (Place(f"{_MEGATRON_SELF}{megatron}.weight"),),
                (Place(f"{_SELF}fused_qkv_a_proj.weight", slots=slots, slot=slot),),
            )
            for slot, (hf, megatron) in enumerate(down)
        ),
    ]


def _whole(hf: str, megatron: str, shape: tuple[int, ...]) -> Rule:
    """Return a rule for a tensor replicated on every tensor rank; the engine uses Hugging Face's name."""
    place = Place(f"{_HF}{hf}.weight")
    return Rule(place.param, shape, (Place(f"{_MEGATRON}{megatron}.weight"),), (place,))


def _by_head(hf: str, megatron: str, shape: tuple[int, ...], dim: int, head: int) -> Rule:
    """Return a rule for a tensor split along ``dim`` in units of a head."""
    slots = (Slot(shape[dim], head),)
    name = f"{_SELF}{hf}.weight"
    trainer = Place(f"{_MEGATRON_SELF}{megatron}.weight", dim=dim, slots=slots)
    return Rule(name, shape, (trainer,), (Place(name, dim=dim, slots=slots),))
