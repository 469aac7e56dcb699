"""Rules shared by Llama-like dense decoders; families differ in biases, qk-norm and defaults."""

from __future__ import annotations

from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture, Place, Rule, Slot, Stage

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def dense_architecture(spec: ModelSpec) -> Architecture:
    """Return rules for embeddings, norms, attention (q|k|v flat), gated MLP (gate|up flat) and head."""
    return Architecture(spec, (*ends(spec), *attention(spec), *dense_mlp(spec)))


def ends(spec: ModelSpec) -> list[Rule]:
    """Return rules for embedding, final norm and head."""
    embedding_shape = (spec.vocab_size, spec.hidden_size)

    def rows(param: str, stage: Stage) -> Place:
        return Place(param, stage, dim=0, padded=True)

    trainer = [rows("embedding.word_embeddings.weight", "first")]
    rules = []
    if spec.tied_embeddings:
        # A last stage that is not the first has a copy, which Megatron's gradient reduction keeps equal.
        trainer.append(rows("output_layer.weight", "last_alone"))
    else:
        rules.append(
            Rule(
                "lm_head.weight",
                embedding_shape,
                (rows("output_layer.weight", "last"),),
                (rows("lm_head.weight", "last"),),
            )
        )
    rules += [
        Rule(
            "model.embed_tokens.weight",
            embedding_shape,
            tuple(trainer),
            (rows("model.embed_tokens.weight", "first"),),
        ),
        Rule(
            "model.norm.weight",
            (spec.hidden_size,),
            (Place("decoder.final_layernorm.weight", "last"),),
            (Place("model.norm.weight", "last"),),
        ),
    ]
    return rules


def attention(spec: ModelSpec) -> list[Rule]:
    """Return rules for grouped-query attention and its norms, in every layer."""
    head, hidden = spec.head_dim, spec.hidden_size
    q, kv = spec.num_heads * head, spec.num_kv_heads * head
    slots = (Slot(q, head), Slot(kv, head), Slot(kv, head))
    rules = []
    for slot, (name, size) in enumerate((("q", q), ("k", kv), ("v", kv))):
        for kind, shape in (("weight", (size, hidden)), ("bias", (size,))):
            if kind == "bias" and not spec.qkv_bias:
                continue
            rules.append(
                Rule(
                    f"{_HF}self_attn.{name}_proj.{kind}",
                    shape,
                    (Place(f"{_MEGATRON}self_attention.linear_qkv.{kind}", dim=0, slots=slots, slot=slot),),
                    (Place(f"{_HF}self_attn.qkv_proj.{kind}", dim=0, slots=slots, slot=slot),),
                )
            )
    output = (Slot(q, head),)
    rules.append(
        Rule(
            f"{_HF}self_attn.o_proj.weight",
            (hidden, q),
            (Place(f"{_MEGATRON}self_attention.linear_proj.weight", dim=1, slots=output),),
            (Place(f"{_HF}self_attn.o_proj.weight", dim=1, slots=output),),
        )
    )
    replicated = [("input_layernorm.weight", "input_layernorm.weight", hidden)]
    if spec.sandwich_norms:
        replicated += [("post_attention_layernorm.weight", "post_self_attn_layernorm.weight", hidden)]
        replicated += [("pre_feedforward_layernorm.weight", "pre_mlp_layernorm.weight", hidden)]
        replicated += [("post_feedforward_layernorm.weight", "post_mlp_layernorm.weight", hidden)]
    else:
        replicated += [("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", hidden)]
    if spec.output_bias:
        replicated += [("self_attn.o_proj.bias", "self_attention.linear_proj.bias", hidden)]
    if spec.qk_norm:
        replicated += [("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", head)]
        replicated += [("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", head)]
    rules += [
        Rule(_HF + hf, (size,), (Place(_MEGATRON + megatron),), (Place(_HF + hf),))
        for hf, megatron, size in replicated
    ]
    return rules


def dense_mlp(spec: ModelSpec) -> list[Rule]:
    """Return rules for the gated MLP of layers without experts."""
    layers = spec.dense_layers
    inner, hidden = spec.intermediate_size, spec.hidden_size
    slots = (Slot(inner), Slot(inner))
    kinds = [("weight", (inner, hidden))] + ([("bias", (inner,))] if spec.mlp_bias else [])
    rules = [
        Rule(
            f"{_HF}mlp.{name}_proj.{kind}",
            shape,
            (Place(f"{_MEGATRON}mlp.linear_fc1.{kind}", dim=0, slots=slots, slot=slot),),
            (Place(f"{_HF}mlp.gate_up_proj.{kind}", dim=0, slots=slots, slot=slot),),
            layers,
        )
        for slot, name in enumerate(("gate", "up"))
        for kind, shape in kinds
    ]
    rules.append(
        Rule(
            f"{_HF}mlp.down_proj.weight",
            (hidden, inner),
            (Place(f"{_MEGATRON}mlp.linear_fc2.weight", dim=1),),
            (Place(f"{_HF}mlp.down_proj.weight", dim=1),),
            layers,
        )
    )
    if spec.mlp_bias:
        rules.append(
            Rule(
                f"{_HF}mlp.down_proj.bias",
                (hidden,),
                (Place(f"{_MEGATRON}mlp.linear_fc2.bias"),),
                (Place(f"{_HF}mlp.down_proj.bias"),),
                layers,
            )
        )
    return rules
