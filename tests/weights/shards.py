"""How a Llama-like model is cut up, written out by hand and independent of the architecture tables.

Every function takes the whole Hugging Face tensors and gives the parameters one rank must hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a model with biases everywhere and qk-norm, so that every kind of tensor occurs."""

    vocab: int = 250
    hidden: int = 16
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    inner: int = 24
    tied: bool = False

    def padded(self, ranks: int) -> int:
        rows = (self.vocab + 63) // 64 * 64
        assert rows % ranks == 0
        return rows


def hf_tensors(sizes: Sizes) -> Tensors:
    """Every element of every tensor has another value."""
    q, kv, h, f = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, sizes.hidden, sizes.inner
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, h)}
    if not sizes.tied:
        shapes["lm_head.weight"] = (sizes.vocab, h)
    shapes["model.norm.weight"] = (h,)
    for n in range(sizes.layers):
        layer = f"model.layers.{n}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (h, q),
            f"{layer}self_attn.o_proj.bias": (h,),
            f"{layer}self_attn.q_norm.weight": (sizes.head_dim,),
            f"{layer}self_attn.k_norm.weight": (sizes.head_dim,),
            f"{layer}input_layernorm.weight": (h,),
            f"{layer}post_attention_layernorm.weight": (h,),
            f"{layer}mlp.gate_proj.weight": (f, h),
            f"{layer}mlp.gate_proj.bias": (f,),
            f"{layer}mlp.up_proj.weight": (f, h),
            f"{layer}mlp.up_proj.bias": (f,),
            f"{layer}mlp.down_proj.weight": (h, f),
            f"{layer}mlp.down_proj.bias": (h,),
        }
    tensors, start = {}, 1
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    assert start < 2**24  # fp32 holds every value
    return tensors


def _share(tensor: torch.Tensor, ranks: int, rank: int, dim: int = 0) -> torch.Tensor:
    return tensor.chunk(ranks, dim)[rank]


def _kv_heads(tensor: torch.Tensor, sizes: Sizes, ranks: int, rank: int) -> torch.Tensor:
    heads = tensor.unflatten(0, (sizes.kv_heads, sizes.head_dim))
    if sizes.kv_heads >= ranks:
        return _share(heads, ranks, rank).flatten(0, 1)
    return heads[rank // (ranks // sizes.kv_heads)]


def _vocab(tensor: torch.Tensor, sizes: Sizes, ranks: int, rank: int) -> torch.Tensor:
    padding = tensor.new_zeros(sizes.padded(ranks) - sizes.vocab, sizes.hidden)
    return _share(torch.cat([tensor, padding]), ranks, rank)


def _layer(hf: Tensors, n: int, sizes: Sizes, ranks: int, rank: int) -> Tensors:
    """Local tensors of one layer, under the engine's names without its prefix."""
    get = {name.removeprefix(f"model.layers.{n}."): tensor for name, tensor in hf.items()}
    out = {name: get[name] for name in get if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias"))}
    for kind in ("weight", "bias"):
        out[f"self_attn.qkv_proj.{kind}"] = torch.cat(
            [
                _share(get[f"self_attn.q_proj.{kind}"], ranks, rank),
                _kv_heads(get[f"self_attn.k_proj.{kind}"], sizes, ranks, rank),
                _kv_heads(get[f"self_attn.v_proj.{kind}"], sizes, ranks, rank),
            ]
        )
        out[f"mlp.gate_up_proj.{kind}"] = torch.cat(
            [_share(get[f"mlp.{part}_proj.{kind}"], ranks, rank) for part in ("gate", "up")]
        )
    out["self_attn.o_proj.weight"] = _share(get["self_attn.o_proj.weight"], ranks, rank, 1)
    out["mlp.down_proj.weight"] = _share(get["mlp.down_proj.weight"], ranks, rank, 1)
    return {name: tensor for name, tensor in out.items() if not name.startswith(("model.", "lm_head"))}


def engine_shard(hf: Tensors, sizes: Sizes, ranks: int, rank: int) -> Tensors:
    """Parameters of one vLLM tensor rank."""
    out = {
        "model.embed_tokens.weight": _vocab(hf["model.embed_tokens.weight"], sizes, ranks, rank),
        "model.norm.weight": hf["model.norm.weight"],
    }
    if not sizes.tied:
        out["lm_head.weight"] = _vocab(hf["lm_head.weight"], sizes, ranks, rank)
    for n in range(sizes.layers):
        layer = _layer(hf, n, sizes, ranks, rank)
        out |= {f"model.layers.{n}.{name}": tensor for name, tensor in layer.items()}
    return out


_MEGATRON_NAMES = {
    "self_attn.qkv_proj": "self_attention.linear_qkv",
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate_up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
}


def trainer_shard(hf: Tensors, sizes: Sizes, ranks: int, rank: int, stages: int, stage: int) -> Tensors:
    """Parameters of one Megatron rank; layers count from 0 in each stage."""
    out = {}
    last = stage == stages - 1
    if stage == 0:
        out["embedding.word_embeddings.weight"] = _vocab(hf["model.embed_tokens.weight"], sizes, ranks, rank)
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if last and (stages > 1 or not sizes.tied):
        head = hf["model.embed_tokens.weight" if sizes.tied else "lm_head.weight"]
        out["output_layer.weight"] = _vocab(head, sizes, ranks, rank)
    per_stage = sizes.layers // stages
    for local in range(per_stage):
        for name, tensor in _layer(hf, stage * per_stage + local, sizes, ranks, rank).items():
            module, kind = name.rsplit(".", 1)
            out[f"decoder.layers.{local}.{_MEGATRON_NAMES[module]}.{kind}"] = tensor
    return out
