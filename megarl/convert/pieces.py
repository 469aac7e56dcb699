"""Map Megatron checkpoint tensors to Hugging Face tensors, derived from the architecture tables.

A piece is the part of one checkpoint tensor that belongs to one layer (and expert). There are two dialects:
Megatron-LM's (q, k and v interleaved per query group, norms under Transformer Engine's names) and that of
MegaRL's run checkpoints (q, k and v separate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megarl.models.spec import ModelSpec
from megarl.models.table import Architecture, Place, Rule

Dialect = Literal["megatron", "megarl"]
VOCAB_MULTIPLE = 128
"""Megatron-LM's default multiple of the padded vocabulary (times the tensor-parallel size)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """``checkpoint[key][index of axes]``: parts concatenated along dimension 0.

    ``axes`` are leading dimensions (index, size): layer, expert. With ``groups`` > 0 the parts are
    interleaved: part 1 of group 1, part 2 of group 1, ..., part 1 of group 2. ``rows`` > 0 pads
    dimension 0. ``twins`` are alternative keys of the same tensor.
    """

    key: str
    axes: tuple[tuple[int, int], ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]  # Hugging Face name and shape
    groups: int = 0
    rows: int = 0
    twins: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape without the leading axes."""
        first = self.parts[0][1]
        return (self.rows or sum(shape[0] for _, shape in self.parts), *first[1:])

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return (*(size for _, size in self.axes), *self.shape)

    @property
    def offset(self) -> tuple[int, ...]:
        """Start of the piece in the checkpoint tensor."""
        return (*(index for index, _ in self.axes), *(0 for _ in self.shape))

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Build the piece from the tensors of its parts."""
        if self.groups:
            split = [t.reshape(self.groups, t.shape[0] // self.groups, *t.shape[1:]) for t in tensors]
            return torch.cat(split, dim=1).flatten(0, 1)
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.rows > whole.shape[0]:
            padding = whole.new_zeros(self.rows - whole.shape[0], *whole.shape[1:])
            whole = torch.cat([whole, padding])
        return whole

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Split the piece into the tensors of its parts, without padding rows."""
        sizes = [shape[0] for _, shape in self.parts]
        if not self.groups:
            return list(whole[: sum(sizes)].split(sizes))
        grouped = whole.reshape(self.groups, sum(sizes) // self.groups, *whole.shape[1:])
        parts = grouped.split([size // self.groups for size in sizes], dim=1)
        return [part.flatten(0, 1) for part in parts]


def pieces_of(architecture: Architecture, dialect: Dialect) -> list[Piece]:
    """Return all pieces of a checkpoint in table order; each Hugging Face tensor is in exactly one."""
    spec = architecture.spec
    stacked = not (spec.moe and spec.dense_layers)  # layers that differ are stored one by one
    found: dict[tuple[str, tuple[tuple[int, int], ...]], Piece] = {}
    for rule in architecture.rules:
        place = rule.trainer[0]
        layers = rule.layers if rule.layers is not None else range(spec.num_layers)
        for layer in layers if "{layer}" in place.param else (0,):
            for expert in range(architecture.num_experts if place.expert else 1):
                piece = _piece(spec, rule, place, dialect, layer, expert, stacked)
                known = found.get((piece.key, piece.axes))
                if known is not None:
                    piece = _with_parts(piece, (*known.parts, *piece.parts))
                found[piece.key, piece.axes] = piece
    pieces = list(found.values())
    names = [name for piece in pieces for name, _ in piece.parts]
    assert sorted(names) == sorted(architecture.hf_shapes()), "each tensor in exactly one piece"
    return pieces


def _piece(
    spec: ModelSpec, rule: Rule, place: Place, dialect: Dialect, layer: int, expert: int, stacked: bool
) -> Piece:
    axes: list[tuple[int, int]] = []
    param = place.param
    if "{layer}" in param:
        is_moe = spec.moe is not None and layer in spec.moe.layers
        names = _names(param, dialect, is_moe, spec.mla is not None)
        if stacked:
            axes.append((layer, spec.num_layers))
            names = [name.replace(".{layer}.", ".") for name in names]
        names = [name.format(layer=layer) for name in names]
    else:
        names = [param]
    if place.expert:
        assert spec.moe is not None
        axes.append((expert, spec.moe.num_experts))
    groups = 0
    if ".linear_qkv." in param:
        if dialect == "megarl":
            names = [f"{names[0]}.{'qkv'[place.slot]}"]
        else:
            groups = spec.num_kv_heads
    rows = 0
    if place.padded:
        multiple = VOCAB_MULTIPLE if dialect == "megatron" else 1
        rows = -(-rule.shape[0] // multiple) * multiple
    hf = rule.hf.format(layer=layer, expert=expert)
    return Piece(names[0], tuple(axes), ((hf, rule.shape),), groups, rows, tuple(names[1:]))


def _with_parts(piece: Piece, parts: tuple[tuple[str, tuple[int, ...]], ...]) -> Piece:
    return Piece(piece.key, piece.axes, parts, piece.groups, piece.rows, piece.twins)


def _names(param: str, dialect: Dialect, is_moe: bool, latent: bool) -> list[str]:
    """Return the checkpoint's name of a layer parameter, then alternative names.

    Transformer Engine fuses a norm into the following linear layer; plain Megatron layers keep it separate,
    but some store it under the fused name.
    """
    if dialect == "megarl":
        return [param]
    if latent:
        for norm, linear in (("q_layernorm.", "linear_q_up_proj."), ("kv_layernorm.", "linear_kv_up_proj.")):
            if f".{norm}" in param:
                return [param.replace(norm, f"{linear}layer_norm_"), param]
    elif param.endswith(".input_layernorm.weight"):
        return [param.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")]
    if param.endswith(".pre_mlp_layernorm.weight"):
        fused = param.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if is_moe:
            return [param, fused]
        return [fused, param] if latent else [fused]
    return [
        param.replace("mlp.experts.w13", "mlp.experts.experts.linear_fc1.weight").replace(
            "mlp.experts.w2", "mlp.experts.experts.linear_fc2.weight"
        )
    ]


def extra_states(architecture: Architecture) -> list[str]:
    """Return the keys of the (empty) extra states that Megatron's modules expect."""
    spec = architecture.spec
    stacked = not (spec.moe and spec.dense_layers)
    keys = []
    for layer in range(spec.num_layers):
        names = [f"self_attention.{name}" for name in _attention_modules(spec)]
        is_moe = spec.moe is not None and layer in spec.moe.layers
        block = "mlp.experts.experts" if is_moe else "mlp"
        names += [f"{block}.linear_fc1", f"{block}.linear_fc2"]
        if is_moe and spec.moe and spec.moe.shared_intermediate_size:
            names += ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
        for name in names:
            index, sizes = ([str(layer)], [str(spec.num_layers)]) if stacked else ([], [])
            prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
            count = spec.moe.num_experts if spec.moe and ".experts.experts." in name else 0
            for expert in range(count) if count else (None,):
                at = [*index, str(expert)] if expert is not None else index or ["0"]
                of = [*sizes, str(count)] if expert is not None else sizes or ["1"]
                keys.append(f"{prefix}{name}._extra_state/shard_{'.'.join(at)}_{'.'.join(of)}")
    return keys


def _attention_modules(spec: ModelSpec) -> list[str]:
    if spec.mla is None:
        return ["linear_qkv", "linear_proj", "core_attention"]
    query = ["linear_q_down_proj", "linear_q_up_proj"] if spec.mla.q_lora_rank else ["linear_q_proj"]
    return [*query, "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "core_attention"]
