"""The driver's handle of an engine in an actor, called by the trainer.

Plans and policy version are kept here and unfinished requests by their sessions, so a new actor can continue
where a dead one stopped: seeded requests give the tokens they would have given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, Self

from megarl.cluster.ray_runtime import ray_temp_dir, start_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.actor.process import Call, EngineProcess, actor_died
from megarl.inference.actor.session import ActorSession
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.interface import AttachReport, EngineError, EngineHealth, SamplingConfig, SyncReport
from megarl.inference.placement import BESIDE_DRIVER, EnginePlace
from megarl.models.table import Region
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan


class ActorEngine:
    """An :class:`megarl.inference.interface.Engine` in a Ray actor. Create it with :meth:`start`."""

    name: ClassVar[str]
    """Name of the engine in messages."""

    @staticmethod
    def actor_class() -> type:
        """Return the body of the actor."""
        raise NotImplementedError

    def __init__(self, settings: EngineSettings, log_path: Path, place: EnginePlace = BESIDE_DRIVER) -> None:
        self._settings = settings
        self._plans: list[WeightPlan] = []
        self._policy_version: int | None = None
        self._asleep = False
        self._paused = False
        self._process = EngineProcess(self.name, self.actor_class(), settings, log_path, place, self._restore)

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
        trust_remote_code: bool = False,
        place: EnginePlace = BESIDE_DRIVER,
        log_name: str = "engine.log",
    ) -> Self:
        """Start the actor in the background; :meth:`wait_ready` joins it.

        Args:
            model_dir: Hugging Face directory; only config.json is read.
            config: the engine's settings.
            dtype: the trainer's parameter dtype, used for ``config.dtype`` "auto".
            max_model_len: maximum number of tokens of prompt and response together.
            seed: seeds requests without a seed.
            keep_kv_cache: keep cached keys and values across a sync (they are then stale).
            offload_kv_cache: let sleep free the KV cache (on a GPU).
            record_routing: include the experts of their tokens in responses.
            trust_remote_code: run Python code of the model's directory, if the backend lacks the model.
            log_dir: directory of the log; None keeps it among Ray's files, while Ray runs.
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
            trust_remote_code=trust_remote_code,
        )
        return cls(settings, (log_dir or ray_temp_dir()).resolve() / log_name, place)

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self._settings.config

    @property
    def max_model_len(self) -> int:
        """See Engine.max_model_len."""
        return self._settings.max_model_len

    @property
    def log_path(self) -> Path:
        """The log of everything the engine's process prints."""
        return self._process.log_path

    @property
    def plans(self) -> list[WeightPlan]:
        """The attached plans, one per engine rank."""
        return self._plans

    def wait_ready(self) -> None:
        """Wait until the engine accepts calls. If its process is killed meanwhile, another is started.

        Raises:
            EngineError: it failed (at once, with the cause), died too often, or start_timeout_seconds passed
            without progress.
        """
        actor = self._process.actor
        try:
            self._process.wait_started()
        except actor_died() as death:
            self._process.replace(death, "it had not started yet", actor)
        self._process.answered()

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """See Engine.describe_parameters."""
        return self._process.call("describe_parameters")

    def regions(self, names: Collection[str]) -> list[Region] | None:
        """See Engine.regions."""
        return self._process.call("regions", list(names))

    def places(self) -> list[tuple[str, str]]:
        """See Engine.places."""
        return self._process.call("places")

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """See Engine.attach. The plans are kept for a restart; their storages must outlive the engine."""
        reports = self._process.call("attach", plans)
        self._plans = plans
        return reports

    def sync(self, policy_version: int) -> SyncReport:
        """See Engine.sync. Nothing is copied for aliased parameters; the trainer must not write meanwhile."""
        report = self._process.call("sync", policy_version)
        self._policy_version = policy_version
        self._process.answered()
        return report

    def checksums(self) -> list[list[RegionChecksum]]:
        """See Engine.checksums."""
        return self._process.call("checksums")

    def session(self, sampling: SamplingConfig) -> ActorSession:
        """See Engine.session. Survives the actor's death."""
        return ActorSession(self._process, sampling, self.max_model_len)

    def abort(self, request_ids: Sequence[str]) -> None:
        """See Engine.abort; the session yields the aborted responses with the tokens sampled so far."""
        self._process.call("abort", list(request_ids))

    def pause(self) -> None:
        """See Engine.pause."""
        self._paused = True
        self._process.call("set_paused", True)

    def resume(self) -> None:
        """See Engine.resume."""
        self._paused = False
        self._process.call("set_paused", False)

    def sleep(self) -> None:
        """See Engine.sleep; needs an engine started with offload_kv_cache."""
        if not self._asleep:
            self._process.call("sleep")
            self._asleep = True

    def wake(self) -> None:
        """See Engine.wake."""
        if self._asleep:
            self._process.call("wake")
            self._asleep = False

    def health(self) -> EngineHealth:
        """See Engine.health. Raises EngineError if the actor does not answer; restarts nothing."""
        try:
            return self._process.value(self._process.actor.health.remote(), timeout=30)
        except (actor_died(), TimeoutError) as error:
            raise EngineError(
                self._process.explain(f"the {self.name} engine does not answer: {error}")
            ) from error

    def shutdown(self) -> None:
        """End the actor. Ray keeps running (:func:`megarl.cluster.ray_runtime.stop_ray`)."""
        self._process.kill()

    def _restore(self, call: Call) -> None:
        """Give a successor the state of its predecessor."""
        self._asleep = False
        if self._plans:
            call("attach", self._plans)
        if self._policy_version is not None:
            call("sync", self._policy_version)
        if self._paused:  # the weights may be half written: do not sample with them
            call("set_paused", True)
