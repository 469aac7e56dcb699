"""Several complete engines behind one engine's interface (rollout.engine.data_parallel_size).

Requests carry their seeds, so a response does not depend on the engine that draws it (on a GPU with
rollout.engine.batch_invariant: see GenerateRequest). Each engine replaces its dead actor itself; the group
does not handle failures.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megarl.config.rollout import EngineConfig
from megarl.inference.backends import engine_class
from megarl.inference.interface import (
    AttachReport,
    Engine,
    EngineHealth,
    EngineMemory,
    EngineSession,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    SyncReport,
    WeightPlanError,
    check_requests,
)
from megarl.inference.placement import EnginePlace
from megarl.inference.router import RequestRouter
from megarl.models.table import Region
from megarl.weights.checksum import RegionChecksum
from megarl.weights.sync_plan import ParamInfo, WeightPlan

T = TypeVar("T")


def start_engines(
    model_dir: Path, config: EngineConfig, places: Sequence[EnginePlace], **options: Any
) -> Engine:
    """Start one engine per place in the background; ``options`` are those of ActorEngine.start.

    A single engine is returned as it is. Several write engine-0.log, engine-1.log ...
    """
    engine = engine_class(config.backend)
    if len(places) == 1:
        return engine.start(model_dir, config, **options, place=places[0])
    return EngineGroup(
        [
            engine.start(model_dir, config, **options, place=place, log_name=f"engine-{number}.log")
            for number, place in enumerate(places)
        ]
    )


class EngineGroup:
    """Several engines as one :class:`megarl.inference.interface.Engine`; their ranks are end to end.

    Calls go to all members concurrently and return when all have answered; the first error is raised.
    """

    def __init__(self, members: Sequence[Engine]) -> None:
        self.members = list(members)

    @property
    def config(self) -> EngineConfig:
        """The settings of each member."""
        return self.members[0].config

    @property
    def max_model_len(self) -> int:
        """See Engine.max_model_len; equal for all members."""
        return self.members[0].max_model_len

    @property
    def plans(self) -> list[WeightPlan]:
        """The attached plans, one per engine rank."""
        return [plan for member in self.members for plan in member.plans]

    def wait_ready(self) -> None:
        """See Engine.wait_ready; waits for all members."""
        self._each(lambda member: member.wait_ready())

    def describe_parameters(self) -> list[dict[str, ParamInfo]]:
        """See Engine.describe_parameters."""
        return _flat(self._each(lambda member: member.describe_parameters()))

    def regions(self, names: Collection[str]) -> list[Region] | None:
        """See Engine.regions; the same of all members."""
        return self.members[0].regions(names)

    def places(self) -> list[tuple[str, str]]:
        """See Engine.places."""
        return _flat(self._each(lambda member: member.places()))

    def attach(self, plans: list[WeightPlan]) -> list[AttachReport]:
        """See Engine.attach. Raises WeightPlanError with the violations of every member."""
        size, violations = self.config.tensor_parallel_size, list[str]()
        if len(plans) != size * len(self.members):
            raise WeightPlanError([f"{len(plans)} plans for {size * len(self.members)} engine ranks"])

        def attach(number: int) -> list[AttachReport] | WeightPlanError:
            try:
                return self.members[number].attach(plans[number * size : (number + 1) * size])
            except WeightPlanError as error:
                return error

        reports = []
        for number, answer in enumerate(_concurrently(attach, range(len(self.members)))):
            if isinstance(answer, WeightPlanError):
                violations += [f"engine {number}: {violation}" for violation in answer.violations]
            else:
                reports += answer
        if violations:
            raise WeightPlanError(violations)
        return reports

    def sync(self, policy_version: int) -> SyncReport:
        """See Engine.sync: the sums of the members' bytes, the time of the slowest."""
        reports = self._each(lambda member: member.sync(policy_version))
        return SyncReport(
            sum(r.bytes_moved for r in reports),
            max(r.seconds for r in reports),
            sum((r.memory for r in reports), EngineMemory()),
        )

    def checksums(self) -> list[list[RegionChecksum]]:
        """See Engine.checksums."""
        return _flat(self._each(lambda member: member.checksums()))

    def session(self, sampling: SamplingConfig) -> GroupSession:
        """See Engine.session."""
        return GroupSession(self.members, sampling)

    def abort(self, request_ids: Sequence[str]) -> None:
        """See Engine.abort."""
        self._each(lambda member: member.abort(request_ids))

    def pause(self) -> None:
        """See Engine.pause; no member decodes after it returns."""
        self._each(lambda member: member.pause())

    def resume(self) -> None:
        """See Engine.resume."""
        self._each(lambda member: member.resume())

    def sleep(self) -> None:
        """See Engine.sleep."""
        self._each(lambda member: member.sleep())

    def wake(self) -> None:
        """See Engine.wake."""
        self._each(lambda member: member.wake())

    def health(self) -> EngineHealth:
        """See Engine.health: the first member's process, the oldest version, the requests of all."""
        answers = self._each(lambda member: member.health())
        versions = [answer.policy_version for answer in answers if answer.policy_version is not None]
        return EngineHealth(
            answers[0].pid,
            min(versions) if len(versions) == len(answers) else None,
            sum(answer.num_unfinished_requests for answer in answers),
            all(answer.paused for answer in answers),
        )

    def shutdown(self) -> None:
        """See Engine.shutdown."""
        self._each(lambda member: member.shutdown())

    def _each(self, call: Callable[[Engine], T]) -> list[T]:
        return _concurrently(call, self.members)


class GroupSession:
    """An :class:`megarl.inference.interface.EngineSession` over a session of each member."""

    def __init__(self, members: Sequence[Engine], sampling: SamplingConfig) -> None:
        self._max_model_len = members[0].max_model_len
        self._sessions = [member.session(sampling) for member in members]
        self._router = RequestRouter(len(members))

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """See EngineSession.submit."""
        check_requests(requests, self._max_model_len)
        shares = self._router.route(requests)
        for session, share in zip(self._sessions, shares, strict=True):
            if share:
                session.submit(share)

    async def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        # Items: responses, an exception of a member, and None for each member whose session has ended.
        answers: asyncio.Queue[list[GeneratedResponse] | Exception | None] = asyncio.Queue()

        async def read(session: EngineSession) -> None:
            try:
                async for responses in session:
                    answers.put_nowait(responses)
                answers.put_nowait(None)
            except Exception as error:
                answers.put_nowait(error)

        readers = [asyncio.create_task(read(session)) for session in self._sessions]
        try:
            num_open = len(readers)
            while num_open:
                answer = await answers.get()
                if answer is None:
                    num_open -= 1
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    for response in answer:
                        self._router.finish(response.request_id)
                    yield answer
        finally:
            for reader in readers:
                reader.cancel()

    def close(self) -> None:
        """See EngineSession.close."""
        for session in self._sessions:
            session.close()


def _concurrently(call: Callable[[Any], T], arguments: Sequence[Any]) -> list[T]:
    """Run ``call`` of each argument in a separate thread; raise the first error at once.

    The threads are daemons, so one that waits for an engine does not keep the process alive.
    """
    answers: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            answers.put((number, call(arguments[number]), None))
        except BaseException as error:
            answers.put((number, None, error))

    for number in range(len(arguments)):
        threading.Thread(target=run, args=(number,), name="engine call", daemon=True).start()
    found: dict[int, Any] = {}
    for _ in arguments:
        number, answer, error = answers.get()
        if error is not None:
            raise error
        found[number] = answer
    return [found[number] for number in range(len(arguments))]


def _flat(lists: Sequence[list[T]]) -> list[T]:
    return [item for part in lists for item in part]
