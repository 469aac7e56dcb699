"""The driver's side of the vLLM engine: starts the actor, talks to it, and replaces it when it dies.

Plans, policy version and unfinished requests are kept here, so a new actor can take up where a
dead one stopped: seeded requests give the tokens they would have given.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megarl import platform
from megarl.cluster.ray_runtime import beside_ranks, ray_temp_dir, start_ray, unlink_on_node
from megarl.cluster.variables import engine_variables
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.rollout.engine import (
    AttachReport,
    EngineError,
    EngineHealth,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    SyncReport,
    WeightPlanError,
)
from megarl.rollout.patience import wait_while_progressing
from megarl.rollout.placement import BESIDE_DRIVER, EnginePlace, threads_per_rank
from megarl.rollout.vllm_build import EngineSettings
from megarl.rollout.vllm_session import VllmSession, actor_died
from megarl.rollout.vllm_worker import EngineActor
from megarl.weights.checksum import RegionChecksum
from megarl.weights.handover import ParamInfo, WeightPlan

log = logging.getLogger(__name__)

MAX_DEATHS_IN_A_ROW = 3
_LOG_TAIL_LINES = 25
_LOG_LINE_WIDTH = 300  # vLLM prints its whole configuration in one line
# Calls that only wait (generate, wait_started) each hold one of the actor's threads.
_ACTOR_THREADS = 16


class VllmEngine:
    """An :class:`megarl.rollout.engine.Engine` in a Ray actor. Make it with :meth:`start`."""

    def __init__(self, settings: EngineSettings, log_path: Path, place: EnginePlace = BESIDE_DRIVER) -> None:
        self._settings = settings
        self._log_path = log_path
        self._place = place
        self._plans: list[WeightPlan] = []
        self._policy_version: int | None = None
        self._deaths_in_a_row = 0
        self._asleep = False
        self._paused = False
        self._replacing = threading.Lock()
        self._shared_memory: list[str] = []
        self._spawn()

    @classmethod
    def start(
        cls,
        model_dir: Path,
        config: EngineConfig,
        *,
        dtype: str,
        max_model_len: int,
        seed: int,
        log_dir: Path | None = None,
        keep_kv_cache: bool = False,
        offload_kv_cache: bool = False,
        record_routing: bool = False,
        place: EnginePlace = BESIDE_DRIVER,
        log_name: str = "engine.log",
    ) -> VllmEngine:
        """Start the actor in the background; :meth:`wait_ready` joins it.

        Args:
            model_dir: Hugging Face directory; only config.json is read.
            config: the engine's own settings.
            dtype: the trainer's parameter type, which ``config.dtype`` "auto" follows.
            max_model_len: most tokens of prompt and response together.
            seed: seeds requests that bring none.
            keep_kv_cache: whether cached keys and values outlive a sync (they are then stale).
            offload_kv_cache: whether sleep can free the KV cache (on a GPU).
            record_routing: whether responses bring the experts that their tokens chose.
            log_dir: where the log goes; None keeps it among Ray's files, while Ray runs.
            place: the node, the devices and the cores.
            log_name: the log's file name.

        Call it from the main thread (see :mod:`megarl.cluster.ray_runtime`).
        """
        start_ray()
        settings = EngineSettings(
            model_dir=str(Path(model_dir).resolve()),
            config=config,
            dtype=dtype if config.dtype == "auto" else config.dtype,
            max_model_len=max_model_len,
            seed=seed,
            temp_dir=str(ray_temp_dir()),
            keep_kv_cache=keep_kv_cache,
            offload_kv_cache=offload_kv_cache,
            record_routing=record_routing,
        )
        return cls(settings, (log_dir or ray_temp_dir()).resolve() / log_name, place)

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self._settings.config

    @property
    def log_path(self) -> Path:
        """Everything the engine's process prints."""
        return self._log_path

    @property
    def plans(self) -> list[WeightPlan]:
        """What is attached, one plan per engine rank."""
        return self._plans

    def wait_ready(self) -> None:
        """Wait until the engine takes calls.

        Raises:
            EngineError: it crashed (at once, with the cause), or start_timeout_seconds passed without a sign
                of progress.
        """
        try:
            self._wait_started()
        except actor_died() as death:
            raise EngineError(self._explain(f"the vLLM engine died while starting: {death}")) from death

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """See Engine.describe_parameters."""
        return self._call("describe_parameters")

    def places(self) -> list[tuple[str, str]]:
        """See Engine.places."""
        return self._call("places")

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """See Engine.attach. The plans are kept for a restart; their storages must outlive the engine."""
        reports = self._call("attach", plans)
        self._plans = plans
        return reports

    def sync(self, policy_version: int) -> SyncReport:
        """See Engine.sync. Nothing is copied for aliased parameters; the trainer must not write meanwhile."""
        report = self._call("sync", policy_version)
        self._policy_version = policy_version
        self._deaths_in_a_row = 0
        return report

    def checksums(self) -> list[list[RegionChecksum]]:
        """See Engine.checksums."""
        return self._call("checksums")

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingConfig
    ) -> Iterator[GeneratedResponse]:
        """See Engine.generate. Survives the actor's death; a consumer that stops early aborts the rest.

        Raises:
            ValueError: a prompt is empty or leaves no room in max_model_len, or an id occurs twice.
            EngineError: the engine failed, or died three times in a row.
        """
        self.check_requests(requests)
        return self._generate({request.request_id: request for request in requests}, sampling)

    def session(self, sampling: SamplingConfig) -> VllmSession:
        """See Engine.session. Survives the actor's death as generate does."""
        return VllmSession(self, sampling)

    def abort(self, request_ids: Sequence[str]) -> None:
        """See Engine.abort; the aborted responses come out of generate with what they had."""
        self._call("abort", list(request_ids))

    def pause(self) -> None:
        """See Engine.pause."""
        self._paused = True
        self._call("set_paused", True)

    def resume(self) -> None:
        """See Engine.resume."""
        self._paused = False
        self._call("set_paused", False)

    def sleep(self) -> None:
        """See Engine.sleep; only an engine started with offload_kv_cache can."""
        if not self._asleep:
            self._call("sleep")
            self._asleep = True

    def wake(self) -> None:
        """See Engine.wake."""
        if self._asleep:
            self._call("wake")
            self._asleep = False

    def health(self) -> EngineHealth:
        """See Engine.health. Raises EngineError when the actor does not answer; restarts nothing."""
        try:
            return self._get(self._actor.health.remote(), timeout=30)
        except (actor_died(), TimeoutError) as error:
            raise EngineError(self._explain(f"the vLLM engine does not answer: {error}")) from error

    def shutdown(self) -> None:
        """End the actor. Ray goes on running (:func:`megarl.cluster.ray_runtime.stop_ray`)."""
        self._kill()

    def _kill(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=True)
        # Its workers' message queues: killed processes do not remove them.
        unlink_on_node(self._shared_memory, self._place.node)
        self._shared_memory = []

    def _spawn(self) -> None:
        import ray

        self._asleep = False
        config = self._settings.config
        threads = threads_per_rank(config, self._place)
        invariant = config.batch_invariant and platform.chosen_name() == "cuda"
        variables = engine_variables(threads, batch_invariant=invariant)
        actor_class: Any = ray.remote(EngineActor)
        self._actor: Any = actor_class.options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=_ACTOR_THREADS,
            **beside_ranks(self._place.node, self._place.devices, variables),
        ).remote(self._settings, str(self._log_path))
        self._started: Any = self._actor.wait_started.remote()

    def _wait_started(self) -> None:
        """Join the actor's start, which on a cold host, with others beside it, takes minutes."""
        patience = self._settings.config.start_timeout_seconds

        def started(seconds: float) -> bool:
            try:
                self._shared_memory = self._get(self._started, timeout=seconds)
            except TimeoutError:
                return False
            return True

        def progress(seconds: float) -> Any:
            try:
                return self._get(self._actor.progress.remote(), timeout=seconds)
            except TimeoutError:
                return None

        if not wait_while_progressing(started, progress, patience):
            message = (
                f"the vLLM engine was not ready and made no progress for {patience:g} s "
                "(rollout.engine.start_timeout_seconds)"
            )
            raise EngineError(self._explain(message))

    def _generate(
        self, unfinished: dict[str, GenerateRequest], sampling: SamplingConfig
    ) -> Iterator[GeneratedResponse]:
        try:
            while unfinished:
                actor = self._actor
                try:
                    for finished in actor.generate.options(num_returns="streaming").remote(
                        list(unfinished.values()), sampling
                    ):
                        for response in self._get(finished):
                            del unfinished[response.request_id]
                            self._deaths_in_a_row = 0
                            yield response
                except actor_died() as death:
                    self._replace(
                        death,
                        f"{len(unfinished)} unfinished requests are sampled again",
                        actor,
                    )
        except GeneratorExit:
            self._actor.abort.remote(list(unfinished))
            raise

    def _call(self, method: str, *args: Any) -> Any:
        """Call the actor; if it dies, once more on its successor."""
        while True:
            actor = self._actor
            try:
                return self._get(getattr(actor, method).remote(*args))
            except actor_died() as death:
                self._replace(death, f"{method} is called again", actor)

    def _replace(self, death: Exception, then: str, dead: Any) -> None:
        """Start a new actor with the stored plans and policy version; or raise EngineError.

        Several threads may meet the same death: all but one find ``dead`` replaced.
        """
        with self._replacing:
            if self._actor is dead:
                self._start_successor(death, then)

    def _start_successor(self, death: Exception, then: str) -> None:
        while True:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
                message = (
                    f"the vLLM engine died {MAX_DEATHS_IN_A_ROW} times in a row; last cause: {_cause(death)}"
                )
                raise EngineError(self._explain(message)) from death
            log.warning("The vLLM engine died (%s). Restarting it; %s.", _cause(death), then)
            self._kill()  # it may be unreachable rather than dead
            self._spawn()
            try:
                self._wait_started()
                if self._plans:
                    self._get(self._actor.attach.remote(self._plans))
                if self._policy_version is not None:
                    self._get(self._actor.sync.remote(self._policy_version))
                if self._paused:  # the weights may be half written: nothing may be sampled with them
                    self._get(self._actor.set_paused.remote(True))
                return
            except actor_died() as next_death:
                death = next_death

    def _get(self, reference: Any, timeout: float | None = None) -> Any:
        """The value of a Ray reference, with errors of the engine as this module's types."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout)
        except GetTimeoutError:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        except RayTaskError as error:
            if isinstance(error.cause, UserError | WeightPlanError | AssertionError):
                raise error.cause from None
            raise EngineError(self._explain(f"the vLLM engine failed: {error.cause!r}")) from error

    def _explain(self, message: str) -> str:
        """``message`` with the end of the engine's log below it."""
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path.exists() else []
        tail = "\n".join(f"  | {line[:_LOG_LINE_WIDTH]}" for line in lines[-_LOG_TAIL_LINES:])
        return f"{message}\nEnd of {self._log_path}:\n{tail or '  | (empty)'}"

    def check_requests(self, requests: Sequence[GenerateRequest]) -> None:
        """Raise ValueError as :meth:`generate` does."""
        limit = self._settings.max_model_len
        seen: set[str] = set()
        for request in requests:
            if request.request_id in seen:
                raise ValueError(f"request {request.request_id}: the id occurs twice")
            seen.add(request.request_id)
            if not 0 < len(request.prompt_ids) < limit:
                raise ValueError(
                    f"request {request.request_id}: a prompt of {len(request.prompt_ids)} tokens does not fit"
                    f" an engine with max_model_len {limit} (at least 1 of each prompt and response)"
                )


def _cause(death: Exception) -> str:
    """The telling part of Ray's description, in one line."""
    text = " ".join(str(death).split())
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text)
    pid = re.search(r"pid: (\d+)", text)
    return (f"pid {pid[1]}: " if pid else "") + (detail[1] if detail else text)[:300]
