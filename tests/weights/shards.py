"""Shards of a Llama-like model, written out by hand and independent of the architecture tables.

Every function takes the whole Hugging Face tensors and returns the parameters one rank must hold.
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
    experts: int = 0  # in every layer but the first, which stays dense
    expert_inner: int = 8

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
        }
        if sizes.experts and n:
            shapes[f"{layer}mlp.gate.weight"] = (sizes.experts, h)
            for e in range(sizes.experts):
                for name in ("gate", "up"):
                    shapes[f"{layer}mlp.experts.{e}.{name}_proj.weight"] = (sizes.expert_inner, h)
                shapes[f"{layer}mlp.experts.{e}.down_proj.weight"] = (h, sizes.expert_inner)
            continue
        shapes |= {
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


@dataclass(frozen=True)
class ExpertShare:
    """Which experts, and which part of each, a rank has: (of how many, which)."""

    experts: tuple[int, int] = (1, 0)
    tensor: tuple[int, int] = (1, 0)


def _experts(get: Tensors, sizes: Sizes, share: ExpertShare) -> Tensors:
    """w13 [E, 2I, H], w2 [E, H, I] of the experts of one rank, stacked."""
    w13, w2 = [], []
    for e in range(sizes.experts):
        expert = f"mlp.experts.{e}."
        rows = [_share(get[f"{expert}{part}_proj.weight"], *share.tensor) for part in ("gate", "up")]
        w13.append(torch.cat(rows))
        w2.append(_share(get[f"{expert}down_proj.weight"], *share.tensor, 1))
    return {
        "mlp.gate.weight": get["mlp.gate.weight"],
        "mlp.experts.routed_experts.w13_weight": _share(torch.stack(w13), *share.experts),
        "mlp.experts.routed_experts.w2_weight": _share(torch.stack(w2), *share.experts),
    }


def _layer(hf: Tensors, n: int, sizes: Sizes, ranks: int, rank: int, share: ExpertShare) -> Tensors:
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
        if not (sizes.experts and n):
            out[f"mlp.gate_up_proj.{kind}"] = torch.cat(
                [_share(get[f"mlp.{part}_proj.{kind}"], ranks, rank) for part in ("gate", "up")]
            )
    out["self_attn.o_proj.weight"] = _share(get["self_attn.o_proj.weight"], ranks, rank, 1)
    if sizes.experts and n:
        out |= _experts(get, sizes, share)
    else:
        out["mlp.down_proj.weight"] = _share(get["mlp.down_proj.weight"], ranks, rank, 1)
    return {name: tensor for name, tensor in out.items() if not name.startswith(("model.", "lm_head"))}


def engine_shard(
    hf: Tensors, sizes: Sizes, ranks: int, rank: int, share: ExpertShare = ExpertShare()
) -> Tensors:
    """Parameters of one vLLM tensor rank."""
    out = {
        "model.embed_tokens.weight": _vocab(hf["model.embed_tokens.weight"], sizes, ranks, rank),
        "model.norm.weight": hf["model.norm.weight"],
    }
    if not sizes.tied:
        out["lm_head.weight"] = _vocab(hf["lm_head.weight"], sizes, ranks, rank)
    for n in range(sizes.layers):
        layer = _layer(hf, n, sizes, ranks, rank, share)
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
    "mlp.gate": "mlp.router",
}
_EXPERT_NAMES = {
    "mlp.experts.routed_experts.w13_weight": "mlp.experts.w13",
    "mlp.experts.routed_experts.w2_weight": "mlp.experts.w2",
}


def trainer_shard(hf: Tensors, sizes: Sizes, ranks: int, rank: int, stages: int, stage: int) -> Tensors:
    """Parameters of one Megatron rank; layers count from 0 in each stage."""
    per_stage = sizes.layers // stages
    layers = list(range(stage * per_stage, (stage + 1) * per_stage))
    return stage_shard(hf, sizes, ranks, rank, layers, first=stage == 0, last=stage == stages - 1)


def stage_shard(
    hf: Tensors,
    sizes: Sizes,
    ranks: int,
    rank: int,
    layers: list[int],
    *,
    first: bool,
    last: bool,
    share: ExpertShare = ExpertShare(),
) -> Tensors:
    """Parameters of a stage (or chunk) that has these layers."""
    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = _vocab(hf["model.embed_tokens.weight"], sizes, ranks, rank)
    if last:
        out["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if last and not (first and sizes.tied):
        head = hf["model.embed_tokens.weight" if sizes.tied else "lm_head.weight"]
        out["output_layer.weight"] = _vocab(head, sizes, ranks, rank)
    for local, number in enumerate(layers):
        for name, tensor in _layer(hf, number, sizes, ranks, rank, share).items():
            if name in _EXPERT_NAMES:
                out[f"decoder.layers.{local}.{_EXPERT_NAMES[name]}"] = tensor
                continue
            module, kind = name.rsplit(".", 1)
            out[f"decoder.layers.{local}.{_MEGATRON_NAMES[module]}.{kind}"] = tensor
    return out
