"""The interface of a rollout engine: token ids in, token ids and logprobs out.

Text never crosses this interface, so nothing is re-tokenised. Per-token values are numpy arrays, created in
the engine's process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import astuple, dataclass, field
from typing import Protocol

import numpy as np

from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.models.table import Region
from megarl.records import ArrayRecord, FinishReason, Logprobs, TokenIds
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan


class EngineError(UserError, RuntimeError):
    """The engine could not start, or died too often; the message has the cause and the log's end."""


class WeightPlanError(ValueError):
    """A weight plan does not fit the engine; one line per violation."""

    def __init__(self, violations: Sequence[str]) -> None:
        super().__init__(
            "the weight plan does not fit the engine:\n" + "\n".join(f"  {v}" for v in violations)
        )
        self.violations = list(violations)

    def __reduce__(self) -> tuple[type[WeightPlanError], tuple[list[str]]]:
        return type(self), (self.violations,)  # between processes; what was passed is not the message


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest(ArrayRecord):
    """One sequence to sample. With a seed, its tokens depend on the weights and the seed only; on a GPU this
    requires rollout.engine.batch_invariant, else rounding depends on the other sequences of the step.

    ``lineage`` identifies its prefix: requests of one (prompt, episode) continue each other, those of one
    prompt share its tokens. None: unknown.
    """

    request_id: str
    prompt_ids: TokenIds  # [P] int32
    max_new_tokens: int
    seed: int | None
    lineage: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Sampling parameters, the same for all requests of a session.

    ``temperature`` 0 is greedy. Sampling ends at the first of ``stop_token_ids`` (kept, with its logprob, as
    the last token) and nowhere else: an end-of-sequence id that is not listed is an ordinary token. With
    ``logprobs``, responses carry log p(token) after temperature, top-k and top-p, renormalised over the
    remaining tokens. ``top_k`` 0 and ``top_p`` 1 keep all.
    """

    temperature: float
    stop_token_ids: tuple[int, ...]
    logprobs: bool
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedResponse(ArrayRecord):
    """The sampled tokens of one request. ``finish_reason`` is "length" at max_new_tokens and at the engine's
    max_model_len; "abort" keeps the tokens sampled so far.

    ``experts`` are those chosen by every token but the last, which the model never processed: prompt and
    response tokens by MoE layers by experts per token. Only from an engine that records them, and not for an
    aborted response.
    """

    request_id: str
    token_ids: TokenIds  # [N] int32
    logprobs: Logprobs  # [N] float32, or [0] if not requested
    finish_reason: FinishReason
    policy_version: int  # of the weights that drew the first token
    experts: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )  # [P + N - 1, layers, k] int16
    # (policy version, number of tokens) in order, if several versions drew the tokens; else empty
    version_spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AttachReport:
    """An engine rank's aliased and copied parameters. ``aliased`` ones are the trainer's memory."""

    aliased: list[str]
    copied: list[str]
    aliased_bytes: int
    copied_bytes: int  # written into the engine's own parameters at every sync
    received_bytes: int = 0  # likewise, from trainer ranks whose memory the engine cannot map
    note: str = ""  # remark on the engine's implementation, for the log


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of an engine rank's process, or of several added up.

    ``parameters`` are its own ones, without those that are the trainer's memory; ``kv_cache`` is what is
    allocated, which a CPU takes page by page. ``allocated`` is all of torch's memory on a GPU, 0 on a CPU;
    ``resident`` is the process's host memory, shared pages of the trainer included.
    """

    parameters: int = 0
    kv_cache: int = 0
    allocated: int = 0
    resident: int = 0

    def __add__(self, other: EngineMemory) -> EngineMemory:
        """Return the sums of each part."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return EngineMemory(*(one + two for one, two in pairs))


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync: bytes written into engine parameters, wall time, memory after it; of all ranks."""

    bytes_moved: int
    seconds: float
    memory: EngineMemory = EngineMemory()


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The state of a live engine. ``policy_version`` is None before the first sync."""

    pid: int
    policy_version: int | None
    num_unfinished_requests: int
    paused: bool


def check_requests(requests: Sequence[GenerateRequest], max_model_len: int) -> None:
    """Raise ValueError if a prompt is empty or leaves no room, or an id is repeated."""
    seen: set[str] = set()
    for request in requests:
        if request.request_id in seen:
            raise ValueError(f"request {request.request_id}: the id occurs twice")
        seen.add(request.request_id)
        if not 0 < len(request.prompt_ids) < max_model_len:
            raise ValueError(
                f"request {request.request_id}: a prompt of {len(request.prompt_ids)} tokens does not fit"
                f" an engine with max_model_len {max_model_len} (at least 1 of each prompt and response)"
            )


class EngineSession(Protocol):
    """Requests submitted as episodes make them; all are decoded together.

    Use it on one event loop. :class:`megarl.inference.client.SessionClient` wraps it as
    ``await client.generate(request)``.
    """

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """Add requests without waiting. Raises check_requests's ValueError, and then adds none."""
        ...

    def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        """Yield responses as they finish, those of one decoding step together; ends with :meth:`close`.

        Raises:
            EngineError: the engine failed permanently.
        """
        ...

    def close(self) -> None:
        """End the session and abort its unfinished requests."""
        ...


class Engine(Protocol):
    """An engine driven by the trainer. Order: wait_ready, attach, sync, then sessions alternate with sync.

    Requests are awaited on an event loop (:meth:`session`); all other calls block, and come from the training
    thread. To add a kind of engine, write a class with these methods and add it to
    :func:`megarl.inference.backends.engine_class`.
    """

    @property
    def config(self) -> EngineConfig:
        """The engine's settings; for several, the settings of each."""
        ...

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and response together."""
        ...

    @property
    def plans(self) -> list[WeightPlan]:
        """The attached plans, one per engine rank."""
        ...

    def wait_ready(self) -> None:
        """Wait until the engine accepts calls; raises EngineError with the cause on failure."""
        ...

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """Return the parameters of every engine rank, tied ones once."""
        ...

    def regions(self, names: Collection[str]) -> list[Region] | None:
        """Return the regions of the parameters by the names of a checkpoint's tensors; equal on all ranks.

        None: use the architecture's table.
        """
        ...

    def places(self) -> list[tuple[str, str]]:
        """Return host and device of every engine rank, as :mod:`megarl.weights.memory_domain` names them."""
        ...

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """Bind one plan per engine rank; raises WeightPlanError with every violation."""
        ...

    def sync(self, policy_version: int) -> SyncReport:
        """Sync the trainer's current weights, drop cached keys and values, set the policy version."""
        ...

    def checksums(self) -> list[list[RegionChecksum]]:
        """Return checksums of every region of the attached plans, per engine rank, as stored there."""
        ...

    def session(self, sampling: SamplingConfig) -> EngineSession:
        """Open a session, to which requests can be submitted at any time."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort these requests now; unknown and finished ids are ignored."""
        ...

    def pause(self) -> None:
        """Stop decoding; unfinished requests are kept."""
        ...

    def resume(self) -> None:
        """Resume decoding after pause."""
        ...

    def sleep(self) -> None:
        """Free the KV cache until :meth:`wake`; nothing is generated meanwhile."""
        ...

    def wake(self) -> None:
        """Allocate the KV cache again, empty."""
        ...

    def health(self) -> EngineHealth:
        """Return the engine's state, or raise EngineError if it does not answer."""
        ...

    def shutdown(self) -> None:
        """End the engine's process."""
        ...
