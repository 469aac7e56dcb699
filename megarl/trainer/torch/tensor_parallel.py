"""Tensor parallelism of a model of transformers, by the plan that its configuration brings.

A plan (``base_model_tp_plan``) names a style for each linear layer. Weights are cut while they are on no
device yet; hooks then exchange activations (:mod:`megarl.trainer.torch.collectives`). A *block*, the
attention or the MLP of a layer, is entered and left by all ranks with the same activations; with sequence
parallelism each has its share of the tokens outside of blocks. Embedding and head are cut by rows of the
vocabulary, whatever the plan says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megarl.errors import UserError
from megarl.losses.all_reduce import sum_of_parts
from megarl.trainer.torch.collectives import copy_to_ranks, gather, scatter
from megarl.trainer.torch.model import PREFIX, Decoder
from megarl.trainer.torch.shards import Split

_COLUMN = {"colwise", "packed_colwise", "colwise_gather_output", "colwise_rep"}
_ROW = {"rowwise", "rowwise_split_input", "rowwise_rep"}
_GATHERS, _SPLITS = {"colwise_gather_output", "colwise_rep"}, {"rowwise_split_input", "rowwise_rep"}
_PER_HEAD, _EXPERTS = "replicated_with_grad_allreduce", "moe_tp_experts"
_KNOWN = _COLUMN | _ROW | {_PER_HEAD, _EXPERTS}
_ADAPTER = re.compile(r"\.(base_layer|lora_[AB]\.default)\b")
"""Part that PEFT inserts into the parameter names of an adapted projection."""
_SEQUENCE = 1  # dimension of tokens in [1, T, H]


@dataclass
class Cut:
    """Result of tensor parallelism: the split of each parameter, by transformers' names.

    Gradients of ``partial`` parameters, which all ranks hold whole, are of a rank's own heads or tokens.
    """

    splits: dict[str, Split] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    whole: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes before, of all parameters."""


def check_plan(decoder: Decoder, size: int) -> None:
    """Refuse, by a UserError, a model without a plan, or whose plan cannot be followed by ``size`` ranks."""
    config, field_ = decoder.lm.config, "parallel.tensor_parallel_size"
    plan = plan_of(decoder)
    if not plan:
        raise UserError(f"{field_}: transformers has no tensor-parallel plan for {decoder.family}")
    used = {style for name, style in plan.items() if any(_fits(name, each) for each in _named(decoder))}
    if unknown := sorted(used - _KNOWN):
        raise UserError(
            f"{field_}: the plan of {decoder.family} has {unknown[0]}, which the torch backend lacks"
        )
    heads = {"num_attention_heads": config.num_attention_heads}
    heads["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name, count in heads.items():
        if count % size:
            raise UserError(f"{field_}: {name} = {count} does not divide by {size} tensor ranks")


def plan_of(decoder: Decoder) -> dict[str, str]:
    """Style by module or parameter of the body, layer numbers as *."""
    return dict(getattr(decoder.lm.config, "base_model_tp_plan", None) or {})


def cut(decoder: Decoder, group: dist.ProcessGroup, *, sequence_parallel: bool) -> Cut:
    """Cut a model on device "meta" and have its ranks exchange activations.

    Raises:
        UserError: the model cannot be shared by so many ranks.
    """
    check_plan(decoder, group.size())
    result = Cut(whole={n.removeprefix(PREFIX): tuple(p.shape) for n, p in decoder.named_parameters()})
    cutter = _Cutter(decoder, group, sequence_parallel, result)
    cutter.embeddings()
    for number, layer in enumerate(decoder.layers()):
        cutter.layer(number, layer)
    if sequence_parallel:  # what is beside the layers works on a rank's tokens
        for name, _ in decoder.body.named_parameters():
            full = cutter.name_of(decoder.body, name)
            if full not in result.splits and f"{cutter.layers_name}." not in full:
                result.partial.add(full)
    return result


class _Cutter:
    def __init__(
        self, decoder: Decoder, group: dist.ProcessGroup, sequence_parallel: bool, result: Cut
    ) -> None:
        self.decoder, self.group, self.sequence = decoder, group, sequence_parallel
        self.size, self.rank, self.result = group.size(), group.rank(), result
        self.plan = plan_of(decoder)
        self.names = {module: name.removeprefix(PREFIX) for name, module in decoder.named_modules()}
        self.layers_name = self.names[decoder.layers()]

    def name_of(self, module: nn.Module, param: str) -> str:
        """A parameter's name as transformers has it."""
        return f"{self.names[module]}.{param}".removeprefix(".")

    def style(self, name: str) -> str | None:
        """Of a module or parameter, by its full name."""
        body = self.names[self.decoder.body]
        relative = re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(f"{body}."))
        return self.plan.get(relative)

    def is_planned(self, module: nn.Module, param: str) -> bool:
        """Whether the plan shares a parameter, or the projection that an adapter's parameter belongs to."""
        return any(
            self.style(_ADAPTER.sub("", name)) is not None
            for name in (self.names[module], self.name_of(module, param))
        )

    # --- parameters ---------------------------------------------------------------------------

    def split(self, module: nn.Module, param: str, dim: int, pieces: int = 1) -> None:
        """Leave this rank's part of a parameter: of each of its ``pieces`` along ``dim`` an equal share."""
        tensor = module._parameters.get(param)
        if tensor is None:
            return
        name, whole = self.name_of(module, param), tensor.shape[dim]
        if whole % (pieces * self.size):
            what = f"{name} has {whole // pieces} rows or columns"
            raise UserError(
                f"parallel.tensor_parallel_size: {what}, which do not divide by {self.size} tensor ranks"
            )
        each = whole // pieces // self.size
        starts = [number * (whole // pieces) + self.rank * each for number in range(pieces)]
        self._replace(module, param, Split(dim % tensor.ndim, tuple((s, s + each) for s in starts)))

    def _replace(self, module: nn.Module, param: str, split: Split) -> None:
        old = module._parameters[param]
        assert old is not None
        shape = list(old.shape)
        shape[split.dim] = split.size
        part = torch.empty(shape, dtype=old.dtype, device=old.device)
        new = nn.Parameter(part, requires_grad=old.requires_grad)  # under adapters it is frozen
        for other in self.decoder.modules():  # tied ones stay tied
            for key, value in other._parameters.items():
                if value is old:
                    other._parameters[key] = new
        self.result.splits[self.name_of(module, param)] = split

    # --- embedding and head -------------------------------------------------------------------

    def embeddings(self) -> None:
        """By rows of the vocabulary."""
        embedding = self.decoder.lm.get_input_embeddings()
        self._vocabulary(embedding, "weight")
        start, stop = self.result.splits[self.name_of(embedding, "weight")].parts[0]

        def localise(module: nn.Module, args: Any) -> Any:
            ids = args[0]
            module.absent = (ids < start) | (ids >= stop)
            return ((ids - start).clamp(0, stop - start - 1), *args[1:])

        def join(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            absent: Any = module.absent
            out = out.masked_fill(absent[..., None], 0.0)
            if self.sequence:
                return scatter(out, _SEQUENCE, self.group, partial=True)
            return sum_of_parts(out, self.group)

        embedding.register_forward_pre_hook(localise)
        embedding.register_forward_hook(join)
        head = self.decoder.lm.lm_head
        if head is not None and not self.decoder.tied:
            self._vocabulary(head, "weight")
        if head is not None and getattr(head, "bias", None) is not None:
            self._vocabulary(head, "bias")

    def _vocabulary(self, module: nn.Module, param: str) -> None:
        rows = getattr(module, param).shape[0]
        each = -(-rows // self.size)
        start = min(self.rank * each, rows)
        self._replace(module, param, Split(0, ((start, min(start + each, rows)),)))

    # --- layers -------------------------------------------------------------------------------

    def layer(self, number: int, layer: nn.Module) -> None:
        """Cut the blocks of a layer; what stands beside them every rank has whole."""
        for block in layer.children():
            planned = [m for m in block.modules() if self.style(self.names[m]) is not None]
            planned_params = {
                self.name_of(module, param)
                for module in block.modules()
                for param in module._parameters
                if self.is_planned(module, param)
            }
            everything = {self.name_of(block, name) for name, _ in block.named_parameters()}
            if planned or planned_params:
                self._block(block, pure=everything <= planned_params)
            elif self.sequence:
                self.result.partial |= everything
        if self.sequence:
            self.result.partial |= {self.name_of(layer, param) for param in layer._parameters}

    def _block(self, block: nn.Module, *, pure: bool) -> None:
        """``pure``: every weight in it is shared, so that all gradients of its input are partial."""
        group, sequence = self.group, self.sequence
        if pure:
            _on_input(
                block,
                lambda x: gather(x, _SEQUENCE, group, partial=True) if sequence else copy_to_ranks(x, group),
            )
        elif sequence:
            _on_input(block, lambda x: gather(x, _SEQUENCE, group, partial=False))
            _on_output(block, lambda x: scatter(x, _SEQUENCE, group, partial=False))

        def leave(x: torch.Tensor) -> torch.Tensor:
            if pure and sequence:
                return scatter(x, _SEQUENCE, group, partial=True)
            return sum_of_parts(x, group)

        for module in list(block.modules()):
            style = self.style(self.names[module])
            if style in _COLUMN:
                self._column(module, style, enter=not pure)
            elif style in _ROW:
                self._row(module, style, leave)
            elif style == _PER_HEAD:
                self.result.partial |= {self.name_of(module, name) for name in module._parameters}
            elif style == _EXPERTS:
                self._experts(module, enter=not pure)

    def _column(self, module: nn.Module, style: str, *, enter: bool) -> None:
        pieces = 2 if style == "packed_colwise" else 1
        base, adapter = _parts_of(module)
        self.split(base, "weight", 0, pieces)
        self.split(base, "bias", 0, pieces)
        if adapter is not None:  # every rank has A whole, and its gradient through its own rows of B
            self.split(adapter.b, "weight", 0, pieces)
            self.result.partial.add(self.name_of(adapter.a, "weight"))
        if enter:
            _on_input(module, lambda x: copy_to_ranks(x, self.group))
        if style in _GATHERS:
            _on_output(module, lambda x: gather(x, -1, self.group, partial=False))

    def _row(self, module: nn.Module, style: str, leave: Callable[[torch.Tensor], torch.Tensor]) -> None:
        linear, adapter = _parts_of(module)
        self.split(linear, "weight", 1)
        if linear.bias is not None and self.sequence:
            self.result.partial.add(self.name_of(linear, "bias"))
        if adapter is not None:  # every rank has B whole, and its gradient through its own columns of A
            self.split(adapter.a, "weight", 1)
            self.result.partial.add(self.name_of(adapter.b, "weight"))
        if style in _SPLITS:
            _on_input(module, lambda x: scatter(x, -1, self.group, partial=False))

        def forward(x: torch.Tensor) -> torch.Tensor:
            out = F.linear(x, linear.weight)
            if adapter is not None and adapter.is_on:
                out = out + adapter(x)
            out = leave(out)
            return out if linear.bias is None else out + linear.bias

        whole: Any = module
        whole.forward = forward

    def _experts(self, module: nn.Module, *, enter: bool) -> None:
        """Experts stacked in parameters of their own: every rank has a part of each expert."""
        for param in list(module._parameters):
            style = self.style(self.name_of(module, param))
            if style in ("packed_colwise", "colwise"):
                self.split(module, param, 1, 2 if style == "packed_colwise" else 1)
            elif style == "rowwise":
                self.split(module, param, 2)
            else:
                name = self.name_of(module, param)
                raise UserError(f"parallel.tensor_parallel_size: the plan says nothing of {name}")
        if enter:
            _on_input(module, lambda x: copy_to_ranks(x, self.group))

        def weigh(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, weights, *rest = args
            return (hidden, chosen, copy_to_ranks(weights, self.group), *rest)

        module.register_forward_pre_hook(weigh)
        _on_output(module, lambda x: sum_of_parts(x, self.group))


class _Adapter:
    """The adapter of PEFT around a projection."""

    def __init__(self, wrapper: Any) -> None:
        (name,) = wrapper.lora_A
        self._wrapper = wrapper
        self.a: nn.Module = wrapper.lora_A[name]
        self.b: nn.Module = wrapper.lora_B[name]
        self._scale = float(wrapper.scaling[name])

    @property
    def is_on(self) -> bool:
        """Whether it counts: not while the reference is computed."""
        return not self._wrapper.disable_adapters

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what it adds to the projection of ``x``."""
        out: torch.Tensor = self.b(self.a(x)) * self._scale
        return out


def _parts_of(module: nn.Module) -> tuple[Any, _Adapter | None]:
    """Return the linear layer of a projection, and its adapter if PEFT has wrapped it."""
    base = getattr(module, "base_layer", None)
    return (module, None) if base is None else (base, _Adapter(module))


def _on_input(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have ``change`` applied to the first tensor that a module is called with."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(before, with_kwargs=True)


def _on_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have ``change`` applied to what a module returns, or to the first of it."""

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.register_forward_hook(after)


def _named(decoder: Decoder) -> list[str]:
    """Modules and parameters of the layers, as a plan has their names."""
    body, layers = decoder.body, decoder.layers()
    (within,) = (name for name, module in body.named_children() if module is layers)
    found = [name for name, _ in layers.named_modules()] + [name for name, _ in layers.named_parameters()]
    return [f"{within}.{name}" for name in found]


def _fits(pattern: str, name: str) -> bool:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name) == pattern
