"""Low-rank adapters of frozen parallel linear layers (LoRA: Hu et al. 2021, arXiv:2106.09685).

A projection W [out, in] computes x W^T + (x A^T) B^T * alpha / rank, A [rank, in] and B [out, rank]. Ranks
that share a layer communicate only activations of the adapter's rank: a column-parallel layer has all of A
and its own rows of B, a row-parallel one its own columns of A and all of B. Fused layers have one adapter for
each Hugging Face projection in them, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megarl.config.lora import LoraConfig
from megarl.models.lora import Matrix, adapted_modules, adapter_shapes, module_of, peft_name, targets_of
from megarl.models.table import Architecture, Region
from megarl.weights.peft import initial_a, merged
from megarl.weights.shared_storage import pool_parameters

SUFFIX = "_lora"
"""Suffix of an adapter's name after its layer's."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One Hugging Face projection in a rank's weight: its name, whole shape, part and local rows."""

    module: str
    shape: tuple[int, int]
    box: tuple[tuple[int, int], ...]
    rows: tuple[int, int]

    @property
    def key(self) -> str:
        """Its name within the layer, e.g. q_proj."""
        return self.module.rpartition(".")[2]


class Adapter(torch.nn.Module):
    """The adapters of one layer: ``<key>_A`` and ``<key>_B`` for each projection, this rank's parts."""

    def __init__(self, layer: torch.nn.Module, projections: list[Projection], lora: LoraConfig) -> None:
        super().__init__()
        assert isinstance(layer, ColumnParallelLinear | RowParallelLinear)
        self.projections = sorted(projections, key=lambda p: p.rows)
        self.rank, self.scale = lora.rank, lora.alpha / lora.rank
        self.is_row = isinstance(layer, RowParallelLinear)
        self.group, self.sequence_parallel = layer.tp_group, layer.config.sequence_parallel
        for p in self.projections:
            inputs = p.box[1][1] - p.box[1][0]
            outputs = p.box[0][1] - p.box[0][0]
            a = torch.nn.Parameter(layer.weight.new_empty(lora.rank, inputs))
            b = torch.nn.Parameter(layer.weight.new_zeros(outputs, lora.rank))
            split, whole, dim = (a, b, 1) if self.is_row else (b, a, 0)
            set_tensor_model_parallel_attributes(split, True, dim, 1)
            # Each tensor rank sees its own tokens, so Megatron sums the gradients over them.
            whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(f"{p.key}_A", a)
            self.register_parameter(f"{p.key}_B", b)

    def matrix(self, projection: Projection, which: Matrix) -> torch.nn.Parameter:
        """Return A or B of a projection."""
        param = getattr(self, f"{projection.key}_{which}")
        assert isinstance(param, torch.nn.Parameter)
        return param

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Initialise as PEFT: A uniform in +-1/sqrt(in), B 0; depends on seed and name, not on the layout."""
        for p in self.projections:
            whole = initial_a(seed, p.module, self.rank, p.shape[1])
            self.matrix(p, "A").copy_(whole[:, slice(*p.box[1])])
            self.matrix(p, "B").zero_()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add the adapters' output: x [T, 1, in] is the layer's input, ``out`` [T, 1, outputs] its output."""
        matrices: list[torch.Tensor] = [self.matrix(p, "A") for p in self.projections]
        low = torch.nn.functional.linear(x, matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        low = self._exchange(low) * self.scale
        parts, stop = [], 0
        for p, part in zip(self.projections, low.split(self.rank, dim=-1), strict=True):
            parts.append(out[..., stop : p.rows[0]])  # rows without an adapter, mostly none
            stop = p.rows[1]
            delta = torch.nn.functional.linear(part, self.matrix(p, "B"))
            parts.append(out[..., p.rows[0] : stop] + delta)
        parts.append(out[..., stop:])
        parts = [part for part in parts if part.shape[-1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _exchange(self, low: torch.Tensor) -> torch.Tensor:
        """Communicate between tensor ranks for the layer's input or output, in the adapter's rank."""
        if self.is_row:
            if self.sequence_parallel:
                low = reduce_scatter_to_sequence_parallel_region(low, group=self.group)
            else:
                low = reduce_from_tensor_model_parallel_region(low, group=self.group)
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.group)
        return low

    @torch.no_grad()
    def merge(self, weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Write weight + B A * alpha / rank to ``into``, added in fp32 and rounded once; return it.

        Each element is written once, so a concurrent reader of unchanged weights sees no change.
        """
        stop = 0
        for p in self.projections:
            into[stop : p.rows[0]] = weight[stop : p.rows[0]]
            rows, stop = slice(*p.rows), p.rows[1]
            into[rows] = merged(weight[rows], self.matrix(p, "A"), self.matrix(p, "B"), self.scale)
        into[stop:] = weight[stop:]
        return into

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Save one tensor per matrix over all ranks, so any layout can read it."""
        assert metadata is not None
        split, dim = ("A", 1) if self.is_row else ("B", 0)
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"{p.key}_{split}": dim for p in self.projections},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class Lora:
    """All adapters of one rank's chunks; freezes the model's weights."""

    def __init__(
        self,
        architecture: Architecture,
        chunks: list[Any],
        params: Mapping[str, torch.nn.Parameter],
        regions: list[Region],
        lora: LoraConfig,
        seed: int,
    ) -> None:
        """Add adapters to ``chunks``; ``params`` and ``regions`` are those of the model alone."""
        self._params, self._on = params, True
        self.shapes = adapter_shapes(adapted_modules(architecture, lora), lora.rank)
        whole, targets = architecture.hf_shapes(), targets_of(architecture, lora)
        self._adapters: dict[str, Adapter] = {}  # by the name of the adapted weight
        self._merged: dict[str, torch.Tensor] = {}
        for param in params.values():
            param.requires_grad_(False)
        in_weight: dict[str, list[Projection]] = {}
        for region in regions:
            if (module := module_of(region.hf, targets)) is not None:
                out, inputs = whole[region.hf]
                rows = region.index[0]
                assert isinstance(rows, tuple)
                projection = Projection(module, (out, inputs), region.box, rows)
                in_weight.setdefault(region.param, []).append(projection)
        for number, chunk in enumerate(chunks):
            prefix = f"chunk{number}." if len(chunks) > 1 else ""
            for name, layer in list(chunk.named_modules()):
                weight = f"{prefix}{name}.weight"
                if (found := in_weight.pop(weight, None)) is not None:
                    self._adapters[weight] = self._attach(chunk, name, Adapter(layer, found, lora))
                    self._adapters[weight].initialize(seed)
            if chunk.pre_process:
                # Recomputed layers have gradients only if their input requires one.
                chunk.embedding.register_forward_hook(_require_grad)
        assert not in_weight, f"no layers for {sorted(in_weight)}"

    def _attach(self, chunk: torch.nn.Module, name: str, adapter: Adapter) -> Adapter:
        parent, _, child = name.rpartition(".")
        chunk.get_submodule(parent).add_module(child + SUFFIX, adapter)

        def add(_layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            return (adapter(inputs[0], output[0]), *output[1:]) if self._on else output

        chunk.get_submodule(name).register_forward_hook(add)
        return adapter

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes with the frozen weights alone."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return this rank's parts of all A and B."""
        return (param for adapter in self._adapters.values() for param in adapter.parameters())

    # --- for engines and export -----------------------------------------------------------------

    def adapter_tensors(self) -> tuple[dict[str, torch.nn.Parameter], list[Region]]:
        """Return this rank's parts of PEFT's tensors: parameters by name, and their regions."""
        params, regions = {}, []
        for weight, adapter in self._adapters.items():
            for p in adapter.projections:
                boxes = {"A": ((0, adapter.rank), p.box[1]), "B": (p.box[0], (0, adapter.rank))}
                for which in ("A", "B"):
                    name = f"{weight.removesuffix('.weight')}{SUFFIX}.{p.key}_{which}"
                    params[name] = adapter.matrix(p, which)
                    index = tuple((0, size) for size in params[name].shape)
                    regions.append(Region(peft_name(p.module, which), boxes[which], name, index))
        return params, regions

    def publish(self) -> None:
        """Write merged weights for engines: a copy of the adapted layers, allocated at the first call.

        The frozen weights are never written to, so they neither drift nor need restoring.
        """
        if not self._merged:
            self._merged.update({name: torch.empty_like(self._params[name]) for name in self._adapters})
            pool_parameters(self._merged)
        self.refresh()

    def refresh(self) -> None:
        """Update published weights, if any."""
        for name, published in self._merged.items():
            self._adapters[name].merge(self._params[name], published)

    def published(self) -> Iterable[torch.Tensor]:
        """Return the merged weights that engines read, none before :meth:`publish`."""
        return self._merged.values()

    def merged_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the parameters with adapters merged in: the published ones, or computed on access."""
        return _MergedWeights(self._params, self._adapters, self._merged)


class _MergedWeights(Mapping[str, torch.Tensor]):
    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        adapters: Mapping[str, Adapter],
        published: Mapping[str, torch.Tensor],
    ) -> None:
        self._params, self._adapters, self._published = params, adapters, published

    def __getitem__(self, name: str) -> torch.Tensor:
        param = self._params[name]
        if name not in self._adapters:
            return param
        published = self._published.get(name)
        return self._adapters[name].merge(param, torch.empty_like(param)) if published is None else published

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _require_grad(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
