"""Record the experts vLLM chose for each token.

On a GPU vLLM returns them itself (enable_return_routed_experts), with its second model runner. A CPU has only
the first one: there they are stored in the same slots as the token's keys and values in the KV cache. Prompts
found in the prefix cache so have theirs, and a preempted request has those of its last computation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from megarl.errors import UserError


class RoutingRecorder:
    """Experts [slots, MoE layers, k] int16 of every token in the KV cache of one worker."""

    def __init__(self, model: torch.nn.Module, num_slots: int, device: torch.device) -> None:
        routers = [runner.router for runner in _runners(model)]
        for router in routers:
            if not isinstance(router, BaseRouter):
                raise UserError(f"rollout.router_replay: vLLM's {type(router).__name__} reports no experts")
        top_k = {router.top_k for router in routers}
        assert len(top_k) == 1, top_k
        # The last row receives the experts of padding.
        shape = (num_slots + 1, len(routers), top_k.pop())
        self._experts = torch.full(shape, -1, dtype=torch.int16, device=device)
        for number, router in enumerate(routers):
            router.set_capture_fn(partial(self._record, number))

    def _record(self, number: int, chosen: torch.Tensor) -> None:
        """Store the experts chosen by MoE layer ``number``: chosen [tokens, k]. Called by its router."""
        mappings = get_forward_context().slot_mapping
        assert isinstance(mappings, dict), "micro-batched forward passes"
        if not mappings:  # vLLM's profiling pass with dummy tokens
            return
        slots = next(iter(mappings.values()))
        assert slots.shape[0] == chosen.shape[0], (
            f"{chosen.shape[0]} tokens chose, {slots.shape[0]} have slots"
        )
        self._experts[slots.long(), number] = chosen.to(torch.int16)

    def read(self, blocks: list[int], block_size: int, num_tokens: int) -> np.ndarray:
        """Return the experts [num_tokens, MoE layers, k] of the sequence with these cache blocks."""
        steps = torch.arange(block_size)
        slots = (torch.tensor(blocks)[:, None] * block_size + steps).flatten()[:num_tokens]
        assert slots.shape[0] == num_tokens, f"{len(blocks)} blocks for {num_tokens} tokens"
        return self._experts[slots.to(self._experts.device)].cpu().numpy()


def expert_layers(model: torch.nn.Module) -> list[int]:
    """Return the indices of the layers with experts, ascending."""
    return [int(runner.layer_id) for runner in _runners(model)]


def returned_routing(returned: np.ndarray, layers: list[int]) -> np.ndarray:
    """Convert vLLM's experts [tokens, all layers, k] to [tokens, MoE layers, k] int16."""
    return np.asarray(returned[:, layers], dtype=np.int16)


def _runners(model: torch.nn.Module) -> list[MoERunner]:
    found = [module for module in model.modules() if isinstance(module, MoERunner)]
    if not found:
        raise UserError("rollout.router_replay: the model has no experts in vLLM")
    return sorted(found, key=lambda runner: runner.layer_id)


def record_routing(model_runner: Any) -> RoutingRecorder:
    """Start recording in a worker whose KV cache is allocated."""
    cache = model_runner.kv_cache_config
    assert len(cache.kv_cache_groups) == 1, "router replay supports one kind of KV cache"
    block_size = cache.kv_cache_groups[0].kv_cache_spec.block_size
    return RoutingRecorder(model_runner.model, cache.num_blocks * block_size, model_runner.device)


def read_routing(
    model_runner: Any, recorder: RoutingRecorder, requests: list[tuple[str, int]]
) -> list[np.ndarray]:
    """Return the experts of the first ``n`` tokens of each (vLLM's request id, n).

    Call it right after the step that finished them: the worker forgets a request at the next step.
    """
    block_size = model_runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    return [recorder.read(model_runner.requests[name].block_ids[0], block_size, n) for name, n in requests]
