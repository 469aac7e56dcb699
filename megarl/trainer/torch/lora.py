"""Low-rank adapters of the torch backend: PEFT's layers in transformers' model, sharded like all others.

LoRA: Hu et al. 2021, arXiv:2106.09685. What engines and exports get is W + B A alpha / rank: a rank's rows of
W and B are the same ones, since FSDP cuts both alike, and A, which is small, is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megarl.config.lora import LoraConfig
from megarl.errors import UserError
from megarl.models.lora import Matrix, adapted_modules, adapter_shapes, peft_name, targets_of
from megarl.models.table import Architecture, Region
from megarl.trainer.torch.model import Decoder
from megarl.trainer.torch.sharded import Sharded
from megarl.trainer.torch.shards import local_regions
from megarl.weights.peft import initial_a, merged
from megarl.weights.shared_storage import pool_parameters

_BASE = ".base_layer"
_MATRICES: dict[Matrix, str] = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


def inject(decoder: Decoder, architecture: Architecture, lora: LoraConfig) -> None:
    """Put PEFT's layers around the target projections of a model on device "meta".

    Raises:
        UserError: PEFT cannot, or is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError("lora: trainer.backend = torch needs the package peft") from None
    alpha: Any = lora.alpha  # a float is as good to PEFT, but for its annotation
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets_of(architecture, lora),
        bias="none",
        init_lora_weights=False,
    )
    try:
        peft.inject_adapter_in_model(config, decoder.lm, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"lora: {str(error).splitlines()[0]}") from error
    dtype = decoder.lm.dtype
    for name, param in decoder.named_parameters():
        is_adapter = ".lora_" in name
        param.requires_grad_(is_adapter)
        if is_adapter:
            param.data = param.data.to(dtype)


def model_name(param: str) -> str:
    """Return transformers' name of a parameter that may be wrapped by an adapter."""
    return param.replace(f"{_BASE}.", ".")


def is_adapter(param: str) -> bool:
    """Whether PEFT has made it."""
    return ".lora_" in param


class TorchLora:
    """Implements :class:`megarl.trainer.weights.Adapters`."""

    def __init__(self, model: Sharded, architecture: Architecture, lora: LoraConfig, seed: int) -> None:
        self._model, self._scale = model, lora.alpha / lora.rank
        modules = adapted_modules(architecture, lora)
        self.shapes: Mapping[str, tuple[int, ...]] = adapter_shapes(modules, lora.rank)
        self._adapted = {f"{module}{_BASE}.weight": module for module in modules}
        missing = [name for name in self._adapted if name not in model.tensors]
        if missing:
            raise UserError(f"lora: the model has no layer {self._adapted[missing[0]]}")
        self._merged: dict[str, torch.Tensor] = {}
        self._whole_a: dict[str, torch.Tensor] = {}
        self._layers: list[Any] = [m for m in model.decoder.modules() if hasattr(m, "_disable_adapters")]
        self._initialize(lora.rank, modules, seed)

    @torch.no_grad()
    def _initialize(self, rank: int, modules: Mapping[str, tuple[int, int]], seed: int) -> None:
        for module, (_, inputs) in modules.items():
            whole = initial_a(seed, module, rank, inputs)
            name = self._name(module, "A")
            for chunk in self._model.parts[name].chunks:
                part = whole[tuple(slice(*span) for span in chunk.at)]
                self._model.tensors[name][tuple(slice(*span) for span in chunk.here)] = part.to(
                    self._model.tensors[name].dtype
                )
            self._model.tensors[self._name(module, "B")].zero_()

    def _name(self, module: str, matrix: Matrix) -> str:
        return f"{module}.{_MATRICES[matrix]}"

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes with the frozen weights alone."""
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False

    # --- for others -----------------------------------------------------------------------------

    def adapter_tensors(self) -> tuple[Mapping[str, torch.Tensor], list[Region]]:
        """This rank's parts of all A and B by name, and where each belongs."""
        regions = []
        for module in self._adapted.values():
            for matrix in _MATRICES:
                name = self._name(module, matrix)
                whole = tuple((0, size) for size in self._model.parts[name].whole)
                regions.append(Region(peft_name(module, matrix), whole, name, whole))
        return self._model.tensors, local_regions(regions, self._model.parts)

    def publish(self) -> None:
        """Write merged weights where engines read them: a copy of adapted layers, made at the first call."""
        if not self._merged:
            self._merged.update({n: torch.empty_like(self._model.tensors[n]) for n in self._adapted})
            pool_parameters(self._merged)
        self.refresh()

    def refresh(self) -> None:
        """Bring published weights up to date; every rank calls it."""
        for name, module in self._adapted.items():
            param = self._model.params[self._name(module, "A")]
            self._whole_a[name] = (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        for name, published in self._merged.items():
            published.copy_(self._merge(name))

    @torch.no_grad()
    def _merge(self, name: str) -> torch.Tensor:
        b = self._model.tensors[self._name(self._adapted[name], "B")]
        return merged(self._model.tensors[name], self._whole_a[name], b, self._scale)

    def published(self) -> Iterable[torch.Tensor]:
        """Return the merged weights that engines read, none before :meth:`publish`."""
        return self._merged.values()

    def merged_weights(self) -> Mapping[str, torch.Tensor]:
        """The model's parameters with adapters merged in, as of the last refresh."""
        return _Merged(self._model.tensors, self)

    def weight(self, name: str) -> torch.Tensor:
        """One of them."""
        if name not in self._adapted:
            return self._model.tensors[name]
        published = self._merged.get(name)
        return self._merge(name) if published is None else published


class _Merged(Mapping[str, torch.Tensor]):
    """Without the adapters' own parameters, which engines do not have."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], lora: TorchLora) -> None:
        self._names, self._lora = [name for name in tensors if not is_adapter(name)], lora

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._lora.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
