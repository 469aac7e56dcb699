"""MegaRL's extension of vLLM's workers (worker_extension_cls): parameters bound to the trainer's memory.

Importing this module also makes vLLM's CPU layers compute with the parameters themselves. vLLM imports it in
every worker process, before the model is built; import it nowhere else.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from megarl.cluster.processes import own_shared_memory
from megarl.inference.cpu_linear import cpu_linear
from megarl.inference.interface import AttachReport, EngineMemory
from megarl.inference.memory_use import engine_memory
from megarl.inference.streamed_weights import StreamedWeights, placeholders
from megarl.inference.vllm.layout import foreign_layouts
from megarl.inference.vllm.routing import RoutingRecorder, expert_layers, read_routing, record_routing
from megarl.inference.weight_receiver import AttachedWeights, check_plan, dtype_name
from megarl.platform import memory
from megarl.weights.checksum import RegionChecksum, region_checksum
from megarl.weights.memory_domain import device_id, host_id
from megarl.weights.sync_plan import ParamInfo, WeightPlan


class WeightReceiver:
    """Methods added to vLLM's workers; each worker selects its own plan from all ranks'."""

    rank: int
    model_runner: Any
    _attached: AttachedWeights | StreamedWeights | None = None
    _routing: RoutingRecorder | None = None

    def megarl_describe(self) -> dict[str, ParamInfo]:
        """Return shape and dtype of every parameter; a tied head is listed once, as the embedding."""
        return {name: ParamInfo(tuple(p.shape), dtype_name(p)) for name, p in self._parameters().items()}

    def megarl_place(self) -> tuple[str, str]:
        """Return host and device of this worker's parameters."""
        return host_id(), device_id(next(iter(self._parameters().values())).device)

    def megarl_shared_memory(self) -> list[str]:
        """Return the names of the message queues that this worker holds."""
        return own_shared_memory()

    def megarl_check(self, plans: list[WeightPlan]) -> list[str]:
        """Return the violations of this rank's plan; changes nothing."""
        plan = plans[self.rank]
        violations = foreign_layouts(self.model_runner.model)
        violations += check_plan(plan, placeholders(plan) if plan.streamed else self._parameters())
        return [f"engine rank {self.rank}: {v}" for v in violations] if len(plans) > 1 else violations

    def megarl_attach(self, plans: list[WeightPlan]) -> AttachReport:
        """Bind a plan that megarl_check accepted."""
        plan, before = plans[self.rank], self._attached
        if plan.streamed:
            model, device = self.model_runner.model, self.model_runner.device
            self._attached = StreamedWeights(plan, model.load_weights, self._parameters(), device)
        else:
            assert not isinstance(before, StreamedWeights), "an architecture has a table or none"
            self._attached = AttachedWeights(plan, self._parameters(), before)
        memory.release_unused()  # the engine's initial weights
        return self._attached.report()

    def megarl_copy(self) -> int:
        """Write parameters that are not aliased and vLLM's derived ones; return the bytes written."""
        assert self._attached is not None
        num_bytes = self._attached.copy_()
        for layer in self._latent_layers().values():  # kv_b_proj is also kept split in two and transposed
            layer.process_weights_after_loading(self.model_runner.dtype)
        memory.wait_for(self.model_runner.device)  # the trainer may write once this returns
        return num_bytes

    def megarl_memory(self) -> tuple[int, EngineMemory]:
        """Return this process's id, and its memory."""
        runner = self.model_runner
        return os.getpid(), engine_memory(self._parameters(), self._attached, runner.kv_caches, runner.device)

    def megarl_discard_cache(self) -> None:
        """Release the KV cache's memory until it is written again (on a CPU, where vLLM cannot)."""
        memory.discard(self.model_runner.kv_caches)

    def megarl_checksums(self) -> list[RegionChecksum]:
        """Return checksums of every region of the plan, read from the engine's parameters."""
        assert self._attached is not None
        if isinstance(self._attached, StreamedWeights):
            return self._attached.checksums()
        return [
            RegionChecksum(param, index, dtype_name(tensor), region_checksum(tensor))
            for param, index, tensor in self._attached.regions()
        ]

    def megarl_record_routing(self) -> None:
        """Record the experts of every token from now on."""
        self._routing = record_routing(self.model_runner)

    def megarl_expert_layers(self) -> list[int]:
        """Return the indices of the layers with experts."""
        return expert_layers(self.model_runner.model)

    def megarl_routing(self, requests: list[tuple[str, int]]) -> list[np.ndarray]:
        """See :func:`megarl.inference.vllm.routing.read_routing`."""
        assert self._routing is not None
        return read_routing(self.model_runner, self._routing, requests)

    def _parameters(self) -> dict[str, torch.Tensor]:
        derived = {f"{name}.{part}" for name in self._latent_layers() for part in ("W_UV", "W_UK_T")}
        named = self.model_runner.model.named_parameters()
        return {name: param for name, param in named if name not in derived}

    def _latent_layers(self) -> dict[str, MLAAttention]:
        modules = self.model_runner.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, MLAAttention)}


def _use_parameter(layer: torch.nn.Module, remove_weight: bool) -> None:
    setattr(layer, "cpu_linear", cpu_linear)  # noqa: B010 - not declared on Module


def _keep_experts_stacked(self: Any, layer: torch.nn.Module) -> None:
    """Replace the packing of experts: they stay stacked as in the trainer's memory."""


def _run_experts(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    a1q_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    expert_tokens_meta: Any,
    apply_router_weight_on_input: bool,
) -> None:
    """Compute gated experts on stacked w1 [E, 2I, H] and w2 [E, H, I] in a loop over those with tokens.

    vLLM's signature; hidden_states [M, H], topk_weights and topk_ids [M, k], output [M, H].
    """
    assert activation == MoEActivation.SILU, activation
    assert self.w1_bias is None, "experts with biases"
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]  # -1: another rank's
    output.zero_()
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_states[rows], w1[expert]).chunk(2, dim=-1)
        value = functional.linear(functional.silu(gate) * up, w2[expert])
        if not apply_router_weight_on_input:
            value = value * topk_weights[rows, slots, None]
        output.index_add_(0, rows, value.to(output.dtype))


def _die_with_parent() -> None:
    """End a tensor-parallel worker together with the actor that spawned it, even while both are starting.

    vLLM's own watch begins later: until then, a worker whose parent was killed waits forever for the other
    ranks.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # the only rank runs in the actor itself
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:
        os._exit(1)


_PR_SET_PDEATHSIG = 1
_die_with_parent()

# After loading, vLLM 0.32 packs weights into private buffers (oneDNN, AMX, zentorch) and empties or replaces
# the parameter, so writes to the trainer's memory would have no effect.
vllm_layers.dispatch_cpu_unquantized_gemm = _use_parameter
CPUUnquantizedExperts.process_weights_after_loading = _keep_experts_stacked
CPUUnquantizedExperts.apply = _run_experts
