"""megatron-core on a CPU: all mappings of torch.cuda entry points.

megatron-core asks torch.cuda for the current device, streams, events and RNG state, and creates a few tensors
with ``device="cuda"``. On a CPU each of these has an exact equivalent (the CPU device, program order, the CPU
generator) or no meaning (pinning, stream waits). megatron-core's files are not changed. GPUs do not use this
file; what both platforms need is in megatron.py.

Call :func:`map_torch` before megatron.core is imported (its modules bind some names at import) and
:func:`map_megatron` after: it maps the names inside megatron.core that only exist for CUDA, and adds what
gloo lacks.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "ones_like", "empty_like")


class _Stream:
    """The only stream of a CPU is program order: waiting for it returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    """An event in program order has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def map_torch() -> None:
    """Map torch.cuda for megatron-core. Called by :func:`megarl.platform.install`, once."""
    for package in ("transformer_engine", "apex"):  # megatron-core would use them if installed
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    _map_torch_cuda()
    _map_tensor_methods()
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))


def _map_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: _CPU
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    for name in ("synchronize", "empty_cache", "set_device", "set_stream"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.get_device_capability = lambda *args, **kwargs: (0, 0)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


def _map_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    original_to, original_type = tensor.to, tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        # Megatron's optimizers sort parameters by comparing this string with 'torch.cuda.FloatTensor'.
        if not args and not kwargs and _caller_is("megatron/core/optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor.to, tensor.type = to, type_


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _caller_is(folder: str) -> bool:
    return folder in sys._getframe(2).f_code.co_filename


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def map_megatron() -> None:
    """Map Megatron's random states to the CPU generator, and give gloo NCCL's abilities."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random.CudaRNGStatesTracker.fork = _fork_rng
    dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu = _to_numpy_if_asked
    mappings._gather_along_first_dim = _gather_uneven(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scatter_uneven(mappings._reduce_scatter_along_first_dim)


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gather uneven parts: gloo gathers equal ones only (unlike NCCL), so all are padded to the largest."""

    @functools.wraps(gather)
    def gather_along(
        tensor: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(tensor, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        out = tensor.new_empty((len(sizes) * max(sizes), *tensor.shape[1:]))
        torch.distributed.all_gather_into_tensor(out, padded, group=group)
        parts = out.view(len(sizes), max(sizes), *tensor.shape[1:])
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather_along


def _scatter_uneven(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Invert :func:`_gather_uneven`: sum over ranks, each gets its part."""

    @functools.wraps(scatter)
    def scatter_along(
        tensor: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(tensor, group, input_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        padded = tensor.new_zeros((len(sizes), max(sizes), *tensor.shape[1:]))
        for row, part in zip(padded, tensor.split(sizes), strict=True):
            row[: part.shape[0]] = part
        out = tensor.new_empty((max(sizes), *tensor.shape[1:]))
        torch.distributed.reduce_scatter_tensor(out, padded.flatten(0, 1), group=group)
        return out[: sizes[group.rank()]]

    return scatter_along


@contextlib.contextmanager
def _fork_rng(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """CudaRNGStatesTracker.fork on the CPU generator."""
    if name not in tracker.states_:
        raise KeyError(f"random number generator state {name!r} has not been added")
    before, outer = torch.get_rng_state(), tracker._current_state_name
    nested = outer != "default-rng"
    if nested:
        tracker.states_[outer] = before
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[outer] if nested else before)
        tracker._current_state_name = outer


def _to_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert to numpy if requested: the CUDA original ignores CPU tensors, but the dispatcher needs it."""
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor
