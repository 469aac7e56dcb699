"""The vLLM side of the engine's process.

Only this process and its workers import vllm. The engine runs in the actor's process (no EngineCore child),
and so does its worker unless there are several (tensor parallelism).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.inference.actor.worker import EngineActor
from megarl.inference.interface import (
    AttachReport,
    EngineMemory,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    WeightPlanError,
)
from megarl.inference.vllm.build import build_engine, returns_routing
from megarl.inference.vllm.worker_failure import end_with_lost_worker
from megarl.platform.memory import resident_bytes
from megarl.records import NO_LOGPROBS, Logprobs, token_ids
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine


class VllmEngineActor(EngineActor):
    """vLLM's LLMEngine on the actor's engine thread."""

    _engine: LLMEngine

    def _build(self) -> None:
        self._engine = build_engine(self._settings)
        self._internal_ids: dict[str, str] = {}  # vLLM's own, by id
        self._expert_layers: list[int] = []  # the MoE layers, if vLLM returns all layers' experts
        if self._settings.record_routing and returns_routing(self._engine):
            self._expert_layers = self._engine.collective_rpc("megarl_expert_layers")[0]

    def _shared_memory(self) -> Iterable[str]:
        workers = self._engine.collective_rpc("megarl_shared_memory")
        return [name for names in workers for name in names]

    def _look_into(self, error: BaseException) -> None:
        end_with_lost_worker(self._engine.model_executor, error)

    def _describe_parameters(self) -> list[dict[str, ParamInfo]]:
        return self._engine.collective_rpc("megarl_describe")

    def _places(self) -> list[tuple[str, str]]:
        return self._engine.collective_rpc("megarl_place")

    def _checksums(self) -> list[list[RegionChecksum]]:
        return self._engine.collective_rpc("megarl_checksums")

    def _attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        ranks = self._engine.collective_rpc("megarl_describe")
        if len(plans) != len(ranks):
            raise WeightPlanError([f"{len(plans)} plans for {len(ranks)} engine ranks"])
        answers = self._engine.collective_rpc("megarl_check", args=(plans,))
        violations = [violation for answer in answers for violation in answer]
        if violations:
            raise WeightPlanError(violations)
        return self._engine.collective_rpc("megarl_attach", args=(plans,))

    def _sleep(self) -> None:
        if not self._on_cpu():
            self._engine.sleep(level=1)
            return
        assert not self._requests, "cannot free the cache of running requests"
        self._engine.reset_prefix_cache()
        self._engine.collective_rpc("megarl_discard_cache")

    def _wake(self) -> None:
        if not self._on_cpu():  # on a CPU, memory returns when the cache is written
            self._engine.wake_up()

    def _on_cpu(self) -> bool:
        return str(self._engine.vllm_config.device_config.device_type) == "cpu"

    def _sync(self, policy_version: int) -> int:
        bytes_moved = sum(self._engine.collective_rpc("megarl_copy"))
        if not self._settings.keep_kv_cache:
            # KV entries of the old weights are stale; running requests recompute theirs.
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(policy_version))
        return bytes_moved

    def _memory(self) -> list[EngineMemory]:
        found = dict(self._engine.collective_rpc("megarl_memory"))
        found.setdefault(os.getpid(), EngineMemory(resident=resident_bytes()))  # the workers are others
        return list(found.values())

    def _add(self, request: GenerateRequest, sampling: SamplingConfig) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            logprobs=0 if sampling.logprobs else None,  # 0: of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompts = self._engine.renderer.render_cmpl([{"prompt_token_ids": request.prompt_ids.tolist()}])
        internal = self._engine.add_request(request.request_id, prompts[0], params)
        self._internal_ids[request.request_id] = internal

    def _step(self) -> list[GeneratedResponse]:
        return self._responses([output for output in self._engine.step() if output.finished])

    def _responses(self, outputs: Sequence[Any]) -> list[GeneratedResponse]:
        experts = self._experts(outputs) if self._settings.record_routing else {}
        for output in outputs:
            del self._internal_ids[output.request_id]
        return [self._response(output, experts.get(output.request_id)) for output in outputs]

    def _experts(self, outputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return the experts of complete responses, by request id; equal on all tensor ranks."""
        whole = [output for output in outputs if output.outputs[0].finish_reason != "abort"]
        if whole and self._expert_layers:
            from megarl.inference.vllm.routing import returned_routing

            rows = [
                returned_routing(output.outputs[0].routed_experts, self._expert_layers) for output in whole
            ]
            return {output.request_id: experts for output, experts in zip(whole, rows, strict=True)}
        wanted = [
            (
                self._internal_ids[output.request_id],
                len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1,
            )
            for output in whole
        ]
        if not wanted:
            return {}
        found = self._engine.collective_rpc("megarl_routing", args=(wanted,))[0]
        return {output.request_id: rows for output, rows in zip(whole, found, strict=True)}

    def _response(self, output: RequestOutput, experts: np.ndarray | None) -> GeneratedResponse:
        completion = output.outputs[0]
        logprobs = completion.logprobs
        assert self._policy_version is not None
        spans = [(int(s.version), s.end - s.start) for s in completion.weight_versions or []]
        return GeneratedResponse(
            request_id=output.request_id,
            token_ids=token_ids(completion.token_ids),
            logprobs=NO_LOGPROBS if logprobs is None else sampled_logprobs(logprobs),
            finish_reason=completion.finish_reason,
            policy_version=spans[0][0] if spans else self._policy_version,
            version_spans=spans if len(spans) > 1 else [],
            experts=experts,
        )

    def _abort(self, request_ids: set[str]) -> list[GeneratedResponse]:
        from vllm.v1.engine import FinishReason

        states = [
            state
            for state in self._engine.output_processor.request_states.values()
            if state.external_req_id in request_ids
        ]
        outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
        self._engine.abort_request(sorted(request_ids))
        return self._responses(outputs)


def sampled_logprobs(flat: Any) -> Logprobs:
    """Return [N] float32 of the sampled tokens: the first entry of each position of vLLM's FlatLogprobs."""
    return np.array(flat.logprobs, np.float32)[np.array(flat.start_indices, np.intp)]
