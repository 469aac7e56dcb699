"""The vLLM side: an actor process with one thread that runs the engine.

Only this process and its workers import vllm. The engine runs in the actor's process (no EngineCore child),
and so does its worker unless there are several (tensor parallelism).
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.cluster.processes import own_shared_memory
from megarl.cluster.ray_runtime import make_temp_dir
from megarl.inference.interface import (
    AttachReport,
    EngineHealth,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    SyncReport,
    WeightPlanError,
)
from megarl.inference.progress_wait import kinds_of_lines
from megarl.inference.vllm.build import EngineSettings, build_engine, returns_routing
from megarl.inference.vllm.worker_failure import end_with_lost_worker
from megarl.records import NO_LOGPROBS, Logprobs, token_ids
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

ResponseQueue = queue.SimpleQueue["list[GeneratedResponse] | BaseException | None"]


class EngineActor:
    """Body of the Ray actor. Ray calls its methods on several threads; all work except waiting is done
    on one engine thread, between decoding steps, so no call sees a half-finished step.
    """

    def __init__(self, settings: EngineSettings, log_path: str) -> None:
        _redirect_output(log_path)
        # The driver's directory, unless this is another host.
        temp_dir = settings.temp_dir if os.path.isdir(settings.temp_dir) else str(make_temp_dir())
        # Variables that are read once are set before this process starts (megarl.cluster.variables).
        os.environ["TMPDIR"] = tempfile.tempdir = temp_dir
        self._settings, self._log_path = settings, Path(log_path)
        self._started: Future[None] = Future()
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._requests: dict[str, ResponseQueue] = {}  # unfinished, by id
        self._sessions: dict[str, ResponseQueue] = {}  # open, by id
        self._internal_ids: dict[str, str] = {}  # vLLM's own, by id
        self._policy_version: int | None = None
        self._paused = False
        self._expert_layers: list[int] = []  # the MoE layers, if vLLM returns all layers' experts
        self._engine: LLMEngine
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # ---- called by the driver, on Ray's threads ----

    def wait_started(self) -> list[str]:
        """Wait until the engine is built, or raise its error; return its processes' shared memory."""
        self._started.result()
        workers = self._on_engine_thread(lambda: self._engine.collective_rpc("megarl_shared_memory"))
        return sorted({*own_shared_memory(), *(name for names in workers for name in names)})

    def progress(self) -> tuple[int, int]:
        """Return counters that grow while the engine starts: imported modules, and kinds of log lines."""
        return len(sys.modules), kinds_of_lines(self._log_path)

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """See Engine.describe_parameters."""
        return self._on_engine_thread(lambda: self._engine.collective_rpc("megarl_describe"))

    def sleep(self) -> None:
        """See Engine.sleep."""
        self._on_engine_thread(self._sleep)

    def wake(self) -> None:
        """See Engine.wake."""
        if not self._on_cpu():  # on a CPU, memory returns when the cache is written
            self._on_engine_thread(lambda: self._engine.wake_up())

    def places(self) -> list[tuple[str, str]]:
        """See Engine.places."""
        return self._on_engine_thread(lambda: self._engine.collective_rpc("megarl_place"))

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """See Engine.attach."""
        return self._on_engine_thread(lambda: self._attach(plans))

    def sync(self, policy_version: int) -> SyncReport:
        """See Engine.sync."""
        return self._on_engine_thread(lambda: self._sync(policy_version))

    def checksums(self) -> list[list[RegionChecksum]]:
        """See Engine.checksums."""
        return self._on_engine_thread(lambda: self._engine.collective_rpc("megarl_checksums"))

    def stream(self, session: str) -> Iterator[list[GeneratedResponse]]:
        """Stream the finished requests of ``session`` until it is ended.

        Requests that finish in one decoding step come together.
        """
        responses = self._session(session)
        while (finished := responses.get()) is not None:
            if isinstance(finished, BaseException):
                raise finished
            yield finished

    def submit(self, session: str, requests: list[GenerateRequest], sampling: SamplingConfig) -> None:
        """Add requests to a session; its stream raises any error about them."""
        responses = self._session(session)
        try:
            self._on_engine_thread(lambda: self._admit(requests, sampling, responses))
        except BaseException as error:
            responses.put(error)

    def end_session(self, session: str) -> None:
        """Abort unfinished requests and end the stream."""
        responses = self._session(session)
        unfinished = [name for name, owner in self._requests.copy().items() if owner is responses]
        self._on_engine_thread(lambda: self._abort(unfinished))
        responses.put(None)
        del self._sessions[session]

    def _session(self, session: str) -> ResponseQueue:
        # Ray's threads may run submit before stream; setdefault is atomic.
        return self._sessions.setdefault(session, queue.SimpleQueue())

    def abort(self, request_ids: list[str]) -> None:
        """See Engine.abort."""
        self._on_engine_thread(lambda: self._abort(request_ids))

    def set_paused(self, paused: bool) -> None:
        """See Engine.pause and Engine.resume."""
        self._on_engine_thread(lambda: setattr(self, "_paused", paused))

    def health(self) -> EngineHealth:
        """See Engine.health; answers during a step too."""
        return EngineHealth(os.getpid(), self._policy_version, len(self._requests), self._paused)

    # ---- on the engine thread ----

    def _run(self) -> None:
        try:
            self._engine = build_engine(self._settings)
            if self._settings.record_routing and returns_routing(self._engine):
                self._expert_layers = self._engine.collective_rpc("megarl_expert_layers")[0]
        except BaseException as error:
            traceback.print_exc()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while True:
                decoding = bool(self._requests) and not self._paused
                self._run_commands(wait=not decoding)
                if self._requests and not self._paused:
                    self._deliver([output for output in self._engine.step() if output.finished])
        except BaseException as error:
            end_with_lost_worker(self._engine.model_executor, error)
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Fail every call with the cause: a decoding step failed and left the engine in an unknown state."""
        traceback.print_exception(error)
        for responses in set(self._requests.values()):
            responses.put(error)
        while True:
            self._commands.get()[1].set_exception(error)

    def _on_engine_thread(self, command: Callable[[], Any]) -> Any:
        self._started.result()
        done: Future[Any] = Future()
        self._commands.put((command, done))
        return done.result()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the queued commands; with ``wait``, block until there is one."""
        while wait or not self._commands.empty():
            wait = False
            command, done = self._commands.get()
            try:
                done.set_result(command())
            except BaseException as error:
                end_with_lost_worker(self._engine.model_executor, error)
                done.set_exception(error)

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

    def _on_cpu(self) -> bool:
        return str(self._engine.vllm_config.device_config.device_type) == "cpu"

    def _sync(self, policy_version: int) -> SyncReport:
        start = time.perf_counter()
        bytes_moved = sum(self._engine.collective_rpc("megarl_copy"))
        if not self._settings.keep_kv_cache:
            # KV entries of the old weights are stale; running requests recompute theirs.
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(str(policy_version))
        self._policy_version = policy_version
        return SyncReport(bytes_moved, time.perf_counter() - start)

    def _admit(
        self,
        requests: list[GenerateRequest],
        sampling: SamplingConfig,
        responses: ResponseQueue,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        assert self._policy_version is not None, "generate before the first sync: the engine has no weights"
        duplicates = self._requests.keys() & {r.request_id for r in requests}
        assert not duplicates, f"request ids already in use: {sorted(duplicates)}"
        for request in requests:
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
            self._requests[request.request_id] = responses

    def _deliver(self, outputs: Sequence[Any]) -> None:
        by_caller: dict[ResponseQueue, list[GeneratedResponse]] = {}
        experts = self._experts(outputs) if self._settings.record_routing else {}
        for output in outputs:
            caller = self._requests.pop(output.request_id)
            del self._internal_ids[output.request_id]
            response = self._response(output, experts.get(output.request_id))
            by_caller.setdefault(caller, []).append(response)
        for caller, finished in by_caller.items():
            caller.put(finished)

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

    def _abort(self, request_ids: list[str]) -> None:
        from vllm.v1.engine import FinishReason

        wanted = self._requests.keys() & set(request_ids)
        states = [
            s for s in self._engine.output_processor.request_states.values() if s.external_req_id in wanted
        ]
        outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
        self._engine.abort_request(sorted(wanted))
        self._deliver(outputs)


def sampled_logprobs(flat: Any) -> Logprobs:
    """Return [N] float32 of the sampled tokens: the first entry of each position of vLLM's FlatLogprobs."""
    return np.array(flat.logprobs, np.float32)[np.array(flat.start_indices, np.intp)]


def _redirect_output(log_path: str) -> None:
    """Redirect everything this process prints, from C++ too, to one file."""
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Ray may have replaced the standard streams.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
