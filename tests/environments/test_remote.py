"""Environments in worker processes: exceptions, hangs and deaths are failures; another worker takes over."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.data import JsonlSource
from megarl.config.environments import CustomEnvironmentConfig, EnvironmentRuntime
from megarl.data.tokenizer import TurnReader
from megarl.environments.process import EnvironmentFailureError
from megarl.environments.remote import EnvironmentWorkers
from megarl.errors import UserError
from megarl.inference.interface import GeneratedResponse
from megarl.records import NO_LOGPROBS, Prompt, TokenIds, token_ids
from megarl.sampling.chat_continuation import ChatContinuation
from megarl.sampling.episode import EpisodeFailedError, EpisodeLimits, EpisodeRunner
from tests.cluster.events import recorded_tasks
from tests.sampling.test_episode import Letters

LIMIT = 3.0

pytestmark = pytest.mark.slow  # five processes to start


def workers(name: str, *, count: int = 1, **arguments: Any) -> EnvironmentWorkers:
    config = CustomEnvironmentConfig(path=f"tests.environments.broken:{name}", arguments=arguments)
    source = JsonlSource(source="jsonl", path="unused", environment=config)
    return EnvironmentWorkers(
        source,
        "data.train",
        EnvironmentRuntime(num_workers=count, timeout_seconds=LIMIT),
        TurnReader(Letters(), (1,)),
    )


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, Any]]:
    """All started side by side: importing is most of it."""
    started = {
        "one": workers("Misbehaves", bonus=0.5),
        "two": workers("Echo", count=2),
        "none": workers("Refuses"),
        "three": workers("Together"),
    }
    yield started
    for each in started.values():
        each.shutdown()
    stop_ray()


def ids_of(text: str) -> TokenIds:
    return token_ids([ord(c) + 100 for c in text] + [1])


async def judge(environment: Any, response: str, index: int = 0) -> tuple[float, dict[str, Any]]:
    episode = copy.copy(environment)
    try:
        await episode.reset(Prompt(index, "p", token_ids([1])))
        result = await episode.step(ids_of(response))
    finally:
        episode.end()
    return result.reward, result.info


def test_every_failure_is_a_failure_and_the_next_episode_is_judged(ready: dict[str, Any]):
    environment = ready["one"].wait_ready()

    def fails(response: str, words: str) -> float:
        start = time.monotonic()
        with pytest.raises(EnvironmentFailureError, match=words):
            asyncio.run(judge(environment, response))
        took = time.monotonic() - start
        reward, info = asyncio.run(judge(environment, "four"))
        assert reward == 4.5
        pids.append(info["pid"])
        return took

    pids = [asyncio.run(judge(environment, ""))[1]["pid"]]
    fails("raise", "KeyError: 'a field'")
    fails("time-out of its own", "my database")
    assert LIMIT <= fails("wait", f"no answer within {LIMIT:g} s") < LIMIT + 10
    assert len(set(pids)) == 1  # the process is well: it only waited
    assert fails("block", "its process was ended") < LIMIT + 15
    fails("die", "its process died")
    assert len(set(pids)) == 3
    assert ready["one"].num_replaced == 2
    assert not psutil.pid_exists(pids[0])


Outcome = tuple[float, dict[str, Any]] | BaseException


def judge_all(environment: Any, responses: list[str], first: int = 0) -> list[Outcome]:
    """Side by side; response i answers prompt first + i."""

    async def all_of_them() -> list[Outcome]:
        waiting = (judge(environment, response, index) for index, response in enumerate(responses, first))
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(all_of_them())


def counted_calls(workers: EnvironmentWorkers, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of answers in each call that judges."""
    calls: list[int] = []
    for process in workers.processes:

        def stream(generation: int, method: str, answers: Any, own: Any = process.stream) -> Any:
            calls.append(len(answers.rows))
            return own(generation, method, answers)

        monkeypatch.setattr(process, "stream", stream)
    return calls


def test_a_failure_among_many_answers_is_that_answers_alone(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Whatever is judged in one call with it; and a process that ends, ends for one answer."""
    environment, calls = ready["one"].wait_ready(), counted_calls(ready["one"], monkeypatch)
    replaced = ready["one"].num_replaced
    expected = {
        41: ("raise", "KeyError: 'a field'"),
        99: ("lock", "TypeError: cannot pickle '_thread.lock'"),
        150: ("die", "its process died"),
        222: ("wait", f"no answer within {LIMIT:g} s"),
        230: ("time-out of its own", "my database"),
        301: ("block", "its process was ended"),
    }
    responses = ["x" * (index % 7) for index in range(400)]
    for index, (response, _) in expected.items():
        responses[index] = response
    judge_all(environment, responses[:40])  # it learns how long a judgement takes
    calls.clear()
    for index, outcome in enumerate(judge_all(environment, responses)):
        if index in expected:
            assert isinstance(outcome, EnvironmentFailureError), index
            assert expected[index][1] in str(outcome) and not outcome.blameless
        else:
            assert not isinstance(outcome, BaseException), outcome
            assert outcome[0] == len(responses[index]) + 0.5
    assert max(calls) > 10 and len(calls) < 300
    # Twice for each of the two that end it, once among others and once alone; a busy machine may add to it.
    assert 2 <= ready["one"].num_replaced - replaced <= 6
    # Known by then, it is judged alone at once.
    replaced = ready["one"].num_replaced
    again = judge_all(environment, responses[140:160], 140)
    failed = [index for index, outcome in enumerate(again) if isinstance(outcome, EnvironmentFailureError)]
    assert failed == [10]
    assert ready["one"].num_replaced - replaced == 1


def test_ray_keeps_no_record_of_what_is_judged(ready: dict[str, Any]):
    environment = ready["one"].wait_ready()
    assert not any(isinstance(outcome, BaseException) for outcome in judge_all(environment, ["x"] * 100))

    @ray.remote(num_cpus=0)
    def told() -> None: ...

    ray.get(told.remote())
    deadline = time.monotonic() + 30
    while not (names := recorded_tasks()) and time.monotonic() < deadline:
        time.sleep(0.2)  # events travel once a second
    assert [name for name in names if name.endswith("told")] and len(names) < 10, names
    assert not any("EnvironmentActor" in name for name in names)


def test_no_more_at_a_time_than_the_environment_says(ready: dict[str, Any]):
    environment = ready["three"].wait_ready()
    outcomes = judge_all(environment, ["slow", *(f"{index}" for index in range(1, 40))])
    for index, outcome in enumerate(outcomes):
        assert not isinstance(outcome, BaseException), outcome
        assert outcome[1]["read"] == (f"{index}" if index else "slow"), "raw: all but the token that ends it"
        assert outcome[1]["prompt"] == index
    infos = [outcome[1] for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert max(info["most"] for info in infos) == 3
    assert infos[0]["place"] > 10, "nobody waits for the slow one"
    died = judge_all(environment, ["0", "die", "2"])
    blamed = [o for o in died if isinstance(o, EnvironmentFailureError) and not o.blameless]
    assert len(blamed) == 1, "of several at a time one is blamed"


def test_episodes_keep_to_their_worker_and_survive_the_death_of_a_neighbour(ready: dict[str, Any]):
    environment = ready["two"].wait_ready()
    tokenizer: Any = Letters()

    async def play() -> list[Any]:
        runner = EpisodeRunner(
            environment, ChatContinuation(tokenizer, (1,), chat_template=True), EpisodeLimits(500, 4, None, 1)
        )

        async def sample(index: int, turn: int, ids: list[int], room: int) -> GeneratedResponse:
            text = "die" if index == 3 and turn == 1 else f"{index}"
            return GeneratedResponse("", ids_of(text), NO_LOGPROBS, "stop", 0)

        def episode(index: int) -> Any:
            return runner.run(Prompt(index, "p", token_ids([1])), lambda *a: sample(index, *a))

        return await asyncio.gather(*map(episode, range(12)), return_exceptions=True)

    results = asyncio.run(play())
    for index, result in enumerate(results):
        if index == 3:
            assert isinstance(result, EpisodeFailedError), result
            assert "prompt 3: its process died" in str(result)
        else:
            assert result.info["heard"] == f"{index}" * 2
            assert result.reward == 1.0


def test_one_that_cannot_be_made_is_a_user_error(ready: dict[str, Any]):
    with pytest.raises(
        UserError, match=r"data.train.environment.arguments: .*Refuses.* ValueError: no such thing"
    ):
        ready["none"].wait_ready()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_package.x:Y", "cannot import no_such_package.x: ModuleNotFoundError"),
        ("tests.environments.broken:Nothing", "tests.environments.broken has no Nothing"),
        ("tests.environments.broken:not_a_class", "lacks reset and step"),
    ],
)
def test_a_wrong_path_is_refused_before_anything_starts(path: str, words: str):
    from megarl.environments import check_references

    with pytest.raises(UserError, match=f"data.train.environment.path: .*{words}"):
        check_references(CustomEnvironmentConfig(path=path), "data.train.environment", [])
