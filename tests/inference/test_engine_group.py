"""Several engines behave as one: scripted members, and real ones against a single one."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.client import SessionClient
from megarl.inference.engine_group import EngineGroup, start_engines
from megarl.inference.interface import (
    EngineError,
    EngineHealth,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    SyncReport,
    WeightPlanError,
)
from megarl.inference.placement import EnginePlace
from megarl.records import token_ids
from tests.inference.conftest import MAX_MODEL_LEN, FusedWeights, _make_model
from tests.inference.driving import generate

PLAIN = SamplingConfig(temperature=1.0, stop_token_ids=(), logprobs=True)


class Scripted:
    """A member with two ranks that answers by the seed, last request first."""

    config = EngineConfig(tensor_parallel_size=2, data_parallel_size=2)
    max_model_len = MAX_MODEL_LEN

    def __init__(self, number: int, meeting: threading.Barrier) -> None:
        self.number, self.meeting = number, meeting
        self.seen: list[str] = []
        self.calls: list[str] = []
        self.attached: list[Any] = []
        self.fails_on = ""
        self.closed = 0

    def session(self, sampling: SamplingConfig) -> ScriptedSession:
        return ScriptedSession(self)

    def attach(self, plans: list[Any]) -> list[Any]:
        self.meeting.wait(10)
        if "bad" in plans:
            raise WeightPlanError([f"{plans.index('bad')} is bad"])
        self.attached = plans
        return [f"report of {plan}" for plan in plans]

    def sync(self, policy_version: int) -> SyncReport:
        self.meeting.wait(10)
        return SyncReport(10 + self.number, 0.5 + self.number)

    def health(self) -> EngineHealth:
        return EngineHealth(100 + self.number, 7 - self.number, 3, paused=self.number == 0)

    def places(self) -> list[tuple[str, str]]:
        return [("host", f"{self.number}.{rank}") for rank in range(2)]

    def wait_ready(self) -> None:
        if self.number == 1:
            raise EngineError("the second did not start")
        time.sleep(60)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self.meeting.wait(10)  # both at once, or none comes through
            self.calls.append(name)

        return call


class ScriptedSession:
    def __init__(self, member: Scripted) -> None:
        self.member = member
        self.answers: asyncio.Queue[GeneratedResponse | None] = asyncio.Queue()

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        for request in reversed(requests):
            self.member.seen.append(request.request_id)
            ids, logprobs = token_ids([request.seed or 0]), np.float32([-1.0])
            self.answers.put_nowait(GeneratedResponse(request.request_id, ids, logprobs, "length", 3))

    async def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        while (answer := await self.answers.get()) is not None:
            if answer.request_id == self.member.fails_on:
                raise EngineError("the member failed")
            yield [answer]

    def close(self) -> None:
        self.member.closed += 1
        self.answers.put_nowait(None)


@pytest.fixture
def members() -> list[Any]:
    meeting = threading.Barrier(2)
    return [Scripted(number, meeting) for number in range(2)]


def requests_of(prompts: int, samples: int, length: int = 5) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"{p}-{s}", token_ids([p + 1, 2, 3]), length, 100 * p + s, (p, p * samples + s))
        for p in range(prompts)
        for s in range(samples)
    ]


def test_every_request_is_answered_once_and_by_its_own_seed(members: list[Any]) -> None:
    requests = requests_of(4, 3)
    responses = list(generate(EngineGroup(members), requests, PLAIN))
    assert {r.request_id: r.token_ids.tolist() for r in responses} == {
        r.request_id: [r.seed] for r in requests
    }
    assert len(responses) == 12
    prompts = [{name.split("-")[0] for name in member.seen} for member in members]
    assert prompts == [{"0", "2"}, {"1", "3"}], "groups are whole"
    assert [member.closed for member in members] == [1, 1]


def test_a_session_takes_requests_while_it_is_read(members: list[Any]) -> None:
    session, found = EngineGroup(members).session(PLAIN), list[str]()

    async def read() -> None:
        async for responses in session:
            for response in responses:
                found.append(response.request_id)
                if len(found) == 2:
                    session.submit([GenerateRequest("more", token_ids([9]), 5, 1)])
                if len(found) == 3:
                    session.close()

    session.submit(requests_of(2, 1))
    asyncio.run(read())
    assert sorted(found) == ["0-0", "1-0", "more"]
    assert [member.closed for member in members] == [1, 1]


def test_requests_of_one_pass_over_the_event_loop_are_dealt_together(members: list[Any]) -> None:
    async def ask() -> list[GeneratedResponse]:
        client = SessionClient(EngineGroup(members), PLAIN)
        answers = await asyncio.gather(*(client.generate(request) for request in requests_of(2, 3)))
        assert client.idle_seconds() > 0
        client.close()
        return answers

    answers = asyncio.run(ask())
    assert [answer.request_id for answer in answers] == [r.request_id for r in requests_of(2, 3)]
    assert [set(member.seen) for member in members] == [{"0-0", "0-1", "0-2"}, {"1-0", "1-1", "1-2"}]


def test_an_error_reaches_everybody_who_waits(members: list[Any]) -> None:
    members[0].fails_on = "0-1"

    async def ask() -> list[Any]:
        client = SessionClient(EngineGroup(members), PLAIN)
        waiting = [client.generate(request) for request in requests_of(2, 2)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        later = await asyncio.gather(client.generate(requests_of(9, 1)[-1]), return_exceptions=True)
        client.close()
        return [*errors, *later]

    found = asyncio.run(ask())
    assert isinstance(found[1], EngineError) and isinstance(found[-1], EngineError)
    assert all(isinstance(each, EngineError | GeneratedResponse) for each in found)


def test_a_consumer_that_stops_ends_what_is_left(members: list[Any]) -> None:
    responses = generate(EngineGroup(members), requests_of(2, 2), PLAIN)
    next(responses)
    responses.close()
    assert [member.closed for member in members] == [1, 1]


def test_a_bad_request_is_refused_before_any_is_sent(members: list[Any]) -> None:
    group = EngineGroup(members)
    with pytest.raises(ValueError, match="request empty: a prompt of 0 tokens"):
        generate(group, [*requests_of(2, 1), GenerateRequest("empty", token_ids([]), 5, 1)], PLAIN)
    assert list(generate(group, [], PLAIN)) == []
    assert [member.seen for member in members] == [[], []]


def test_an_error_of_one_member_is_the_groups(members: list[Any]) -> None:
    members[1].fails_on = "1-1"
    with pytest.raises(EngineError, match="the member failed"):
        list(generate(EngineGroup(members), requests_of(2, 2), PLAIN))
    began = time.monotonic()
    with pytest.raises(EngineError, match="the second did not start"):
        EngineGroup(members).wait_ready()
    assert time.monotonic() - began < 30, "the first still starts"


@pytest.mark.parametrize("name", ["pause", "resume", "sleep", "wake", "shutdown", "abort"])
def test_calls_reach_all_members_at_once(members: list[Any], name: str) -> None:
    getattr(EngineGroup(members), name)(*([["a"]] if name == "abort" else []))
    assert [member.calls for member in members] == [[name], [name]]


def test_ranks_lie_end_to_end(members: list[Any]) -> None:
    group = EngineGroup(members)
    plans: Any = ["a", "b", "c", "d"]
    assert group.attach(plans) == ["report of a", "report of b", "report of c", "report of d"]
    assert [member.attached for member in members] == [["a", "b"], ["c", "d"]]
    assert [device for _, device in group.places()] == ["0.0", "0.1", "1.0", "1.1"]
    assert group.sync(4) == SyncReport(10 + 11, 1.5)
    assert group.health() == EngineHealth(100, 6, 6, paused=False)


def test_violations_of_all_members_are_told(members: list[Any]) -> None:
    plans: Any = ["bad", "b", "c", "bad"]
    with pytest.raises(WeightPlanError) as error:
        EngineGroup(members).attach(plans)
    assert error.value.violations == ["engine 0: 0 is bad", "engine 1: 1 is bad"]
    with pytest.raises(WeightPlanError, match="3 plans for 4 engine ranks"):
        EngineGroup(members).attach(plans[:3])


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineGroup]:
    """Two real engines that alias one block of shared memory."""
    directory = tmp_path_factory.mktemp("group")
    model = _make_model("llama", directory)
    config = EngineConfig(kv_cache_gib=0.05, data_parallel_size=2)
    places = [EnginePlace(cores=1)] * 2
    options = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "seed": 1, "log_dir": directory / "logs"}
    started = start_engines(directory, config, places, **options)
    assert isinstance(started, EngineGroup)
    started.wait_ready()
    params = started.describe_parameters()
    weights = FusedWeights(params[0], "float32")
    weights.load(model)
    started.attach([weights.alias_plan()] * 2)
    started.sync(0)
    yield started
    started.shutdown()
    stop_ray()


def drawn(responses: Iterator[GeneratedResponse]) -> dict[str, list[int]]:
    found = {response.request_id: response.token_ids.tolist() for response in responses}
    assert found
    return found


@pytest.mark.slow
def test_two_engines_draw_what_one_draws(group: EngineGroup) -> None:
    requests = requests_of(5, 4, length=40)
    alone = {r.request_id: r for r in generate(group.members[0], requests, PLAIN)}
    together = {r.request_id: r for r in generate(group, requests, PLAIN)}
    assert {n: r.token_ids.tolist() for n, r in together.items()} == {
        n: r.token_ids.tolist() for n, r in alone.items()
    }
    for name, response in alone.items():
        assert together[name].logprobs == pytest.approx(response.logprobs, abs=1e-5)
        assert together[name].policy_version == 0
    assert group.sync(1).bytes_moved == 0
    assert [member.log_path.name for member in group.members] == ["engine-0.log", "engine-1.log"]
    assert all(member.log_path.stat().st_size for member in group.members)


@pytest.mark.slow
def test_a_killed_member_is_replaced_and_draws_the_same(group: EngineGroup) -> None:
    group.sync(3)
    requests = requests_of(6, 2, length=200)
    before = drawn(generate(group, requests, PLAIN))
    pids = [member.health().pid for member in group.members]

    def kill() -> None:
        time.sleep(0.3)
        os.kill(pids[1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    during = drawn(generate(group, requests, PLAIN))
    thread.join()
    after = drawn(generate(group, requests, PLAIN))
    assert before == during == after
    now = [member.health().pid for member in group.members]
    assert now[0] == pids[0] and now[1] != pids[1]
    assert group.health().policy_version == 3
