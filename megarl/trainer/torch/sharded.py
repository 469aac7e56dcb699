"""A rank's part of a model: the decoder cut by tensor parallelism and FSDP2, and its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from megarl.models.spec import VOCAB_PADDING
from megarl.trainer.interface import RankContext
from megarl.trainer.torch.model import PREFIX, Decoder, named_tensors
from megarl.trainer.torch.shards import Part, chunks_of
from megarl.trainer.torch.tensor_parallel import Cut, cut
from megarl.weights.shared_storage import pool_parameters


class Groups:
    """The ranks that share this rank's tensors in one way or another."""

    def __init__(self, context: RankContext) -> None:
        layout, replicas = context.layout, context.trainer.replicate_size
        self.shards, self._offloads = layout.data // replicas, context.trainer.cpu_offload
        sizes = {"replicate": replicas, "shard": self.shards, "tensor": layout.tensor}
        self._mesh = init_device_mesh(
            context.platform.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        self.tensor: dist.ProcessGroup | None = None
        if layout.tensor > 1:
            self.tensor = self._mesh["tensor"].get_group()
        replica, self.shard = divmod(context.at.data, self.shards)
        self.replicas, self.is_first_replica = replicas, replica == 0
        self.tensor_size, self.is_first_tensor_rank = layout.tensor, context.at.tensor == 0

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """Of the ranks that see different sequences; None where FSDP has nothing to do."""
        if self.replicas * self.shards == 1 and not self._offloads:
            return None
        return self._mesh["shard"] if self.replicas == 1 else self._mesh["replicate", "shard"]


class Sharded:
    """This rank's tensors of a model, by transformers' names.

    ``tensors`` are plain local tensors, which share memory with the model's parameters; ``parts`` says where
    in the whole ones they lie.
    """

    def __init__(self, context: RankContext, decoder: Decoder) -> None:
        """Cut ``decoder``, which is on no device, and allocate what is left of it."""
        self.decoder, self.groups = decoder, Groups(context)
        self.device = context.platform.device
        self.cut = Cut(whole={n.removeprefix(PREFIX): tuple(p.shape) for n, p in decoder.named_parameters()})
        if self.groups.tensor is not None:
            sequence = context.layout.sequence_parallel
            self.cut = cut(decoder, self.groups.tensor, sequence_parallel=sequence)
        self.mesh = self.groups.data_mesh
        if self.mesh is None:
            _allocate(decoder, self.device, self.device)
            pool_parameters(_in_pool_order(dict(decoder.named_parameters())), _padded(decoder))
        else:
            self._shard(context, self.mesh)
        self.params = {n.removeprefix(PREFIX): p for n, p in decoder.named_parameters()}
        self.tensors = {name: local(tensor) for name, tensor in named_tensors(decoder)}
        self.parts = {name: self._part(name, tensor) for name, tensor in self.tensors.items()}

    def _shard(self, context: RankContext, mesh: DeviceMesh) -> None:
        """FSDP2 over the layers one by one, and over what is beside them together."""
        trainer = context.trainer
        offload: OffloadPolicy = OffloadPolicy()
        if trainer.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "offload_policy": offload,
        }
        for layer in self.decoder.layers():
            fully_shard(layer, reshard_after_forward=trainer.reshard_after_forward, **options)
        fully_shard(self.decoder, reshard_after_forward=False, **options)
        for module in self.fsdp_modules():
            # Loss weights have the step's denominators: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        _allocate(self.decoder, torch.device("cpu") if trainer.cpu_offload else self.device, self.device)

    def fsdp_modules(self) -> Iterator[FSDPModule]:
        """The root first."""
        return (module for module in self.decoder.modules() if isinstance(module, FSDPModule))

    def _part(self, name: str, tensor: torch.Tensor) -> Part:
        groups, split = self.groups, self.cut.splits.get(name)
        is_param = name in self.params
        whole = self.cut.whole[name] if is_param else tuple(tensor.shape)
        rows, copies = None, 1
        if is_param and self.mesh is not None:
            size = split.size if split is not None and split.dim == 0 else whole[0]
            each = -(-size // groups.shards)
            start = min(groups.shard * each, size)
            rows = (start, min(start + each, size))
            copies *= groups.replicas
        elif self.mesh is not None:
            copies *= groups.replicas * groups.shards
        if split is None:
            copies *= groups.tensor_size
        first = groups.is_first_replica and (split is not None or groups.is_first_tensor_rank)
        first = first and (is_param or groups.shard == 0)
        chunks = chunks_of(whole, split, rows)
        assert sum(_size(chunk.sizes) for chunk in chunks) == tensor.numel(), (name, chunks, tensor.shape)
        return Part(whole, chunks, copies, first)

    # --- passes -------------------------------------------------------------------------------

    def begin_backward(self, *, reduce: bool) -> None:
        """With ``reduce`` gradients are reduced over ranks in the next backward pass, else added up here."""
        if self.mesh is not None:
            root = next(self.fsdp_modules())
            root.set_requires_gradient_sync(reduce)
            root.set_is_last_backward(reduce)

    def end_pass(self) -> None:
        """Give up what a pass has gathered."""
        for module in self.fsdp_modules():
            module.reshard()

    def take_gradients(self, names: list[str], main: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of each gradient in fp32, summed over all ranks that have one; none are left.

        ``main`` has what was added up elsewhere than beside the parameters, and is changed.
        """
        found = {}
        for name in names:
            grad, self.params[name].grad = self.params[name].grad, None
            if name in main:
                found[name] = main[name] if grad is None else main[name].add_(local(grad))
            elif grad is not None:
                found[name] = local(grad).float()
            else:
                found[name] = torch.zeros_like(self.tensors[name], dtype=torch.float32)
        if self.groups.tensor is not None:
            _sum_together([found[n] for n in names if n in self.cut.partial], self.groups.tensor)
        return found

    @contextmanager
    def exchanged(self, others: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the model computes with ``others``, as :meth:`copies` made them: pointers change places.

        What engines read, the memory of ``tensors``, stays as it is.
        """
        self.end_pass()
        own = self._held()
        self._hold(others)
        try:
            yield
        finally:
            self.end_pass()
            self._hold(own)

    def copies(self) -> dict[str, torch.Tensor]:
        """Return clones of the tensors that the model computes with."""
        return {name: tensor.detach().clone() for name, tensor in self._held().items()}

    def _held(self) -> dict[str, torch.Tensor]:
        return {name: getattr(*holder) for name, holder in self._holders().items()}

    def _hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, holder in self._holders().items():
            setattr(*holder, tensors[name])

    def _holders(self) -> dict[str, tuple[Any, str]]:
        """By a name, the object and attribute with the memory that a parameter is computed from."""
        if self.mesh is None:
            return {name: (param, "data") for name, param in self.params.items()}
        groups = (g for module in self.fsdp_modules() for g in module._get_fsdp_state()._fsdp_param_groups)
        gathered = [each for group in groups for each in group.fsdp_params]
        # A shard's flat, padded memory is what FSDP gathers from; the parameter itself is a view of it.
        return {str(number): (each, "_sharded_param_data") for number, each in enumerate(gathered)}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a parameter or gradient on this rank, as a plain tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _size(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _allocate(decoder: Decoder, device: torch.device, buffers_on: torch.device) -> None:
    """Give all parameters memory on ``device``, and bring buffers, which have values, to ``buffers_on``."""
    buffers = [
        (module, name, buffer)
        for module in decoder.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    tied = [
        (module, name, param)
        for module in decoder.modules()
        for name, param in module.named_parameters(recurse=False)
    ]
    decoder.to_empty(device=device)
    new: dict[int, nn.Parameter] = {}
    for module, name, param in tied:
        now = module._parameters[name]
        assert now is not None
        module._parameters[name] = new.setdefault(id(param), now)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(buffers_on)


def _in_pool_order(params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """As engines fuse them: weights of a block, q, k and v among them, end to end, and then its biases."""
    blocks: dict[str, int] = {}
    for name in params:
        blocks.setdefault(name.rpartition(".")[0].rpartition(".")[0], len(blocks))
    names = sorted(
        params, key=lambda n: (blocks[n.rpartition(".")[0].rpartition(".")[0]], n.endswith("bias"))
    )
    return {name: params[name] for name in names}


def _padded(decoder: Decoder) -> dict[str, int]:
    """Elements of the embedding and the head with the rows that engines add to the vocabulary."""
    ends = {id(decoder.lm.get_input_embeddings().weight)}
    if decoder.lm.lm_head is not None:
        ends.add(id(decoder.lm.lm_head.weight))
    return {
        name: -(-param.shape[0] // VOCAB_PADDING) * VOCAB_PADDING * param.shape[1]
        for name, param in decoder.named_parameters()
        if id(param) in ends
    }


def _sum_together(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sum each tensor over the ranks of ``group``, in place and in one exchange."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
