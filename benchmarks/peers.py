"""Token logprobs of other projects, loaded from their packages; missing ones are reported and left out."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

Logprob = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [T, V], targets [T] -> [T]
HeadLogprob = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def eager(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute logprobs in plain torch."""
    return torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).squeeze(1)


def eager_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute logprobs in plain torch, from hidden states and a head."""
    return eager(hidden @ weight.t(), targets)


def token_peers() -> tuple[dict[str, Logprob], list[str]]:
    """Return peers on logits, and a line for each that is unavailable."""
    found: dict[str, Logprob] = {"torch_eager": eager, "torch_compile": torch.compile(eager, dynamic=False)}
    missing: list[str] = []
    loaders: dict[str, Callable[[], Logprob]] = {
        "megatron": _megatron,
        "megatron_fused": _megatron_fused,
        "trl_selective_log_softmax": lambda: (
            importlib.import_module("trl.trainer.utils").selective_log_softmax
        ),
    }
    for name, load in loaders.items():
        try:
            found[name] = load()
        except ImportError as error:
            missing.append(f"{name}: {error}")
    missing.append("liger_kernel: needs a GPU (Triton)")
    return found, missing


def head_peers() -> tuple[dict[str, HeadLogprob], list[str]]:
    """Return peers on (hidden, weight), and a line for each that is unavailable."""
    found: dict[str, HeadLogprob] = {"torch_eager": eager_head}
    try:
        linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        return found, [f"cut_cross_entropy: {error}"]

    def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = linear_cross_entropy(
            hidden, weight, targets, impl="torch_compile", reduction="none"
        )
        return -loss

    return {**found, "cut_cross_entropy_torch_compile": cut_cross_entropy}, []


@functools.cache
def _megatron_group() -> dist.ProcessGroup:
    from megarl import platform

    platform.install()
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def _megatron() -> Logprob:
    _megatron_group()
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def megatron(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1))
        return -loss.squeeze(1)

    return megatron


def _megatron_fused() -> Logprob:
    group = _megatron_group()
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    def megatron_fused(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = fused_vocab_parallel_cross_entropy(
            logits.unsqueeze(1), targets.unsqueeze(1), group
        )
        return -loss.squeeze(1)

    return megatron_fused


def report_missing(missing: list[str]) -> None:
    """Print a line per missing peer."""
    for line in missing:
        print(f"left out: {line}", file=sys.stderr)
