"""Environments in processes of their own: what raises, hangs or dies is a failure, and another takes over."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.data import JsonlSource
from megarl.config.environments import CustomEnvironmentConfig, EnvironmentRuntime
from megarl.environments.remote import EnvironmentFailureError, EnvironmentWorkers
from megarl.errors import UserError
from megarl.records import NO_LOGPROBS, Prompt, token_ids
from megarl.rollout.engine import GeneratedResponse
from megarl.rollout.episode import EpisodeFailedError, EpisodeLimits, EpisodePlayer
from megarl.rollout.turns import TurnTokens
from tests.rollout.test_episode import Letters

LIMIT = 1.5

pytestmark = pytest.mark.slow  # four processes to start


def workers(name: str, *, count: int = 1, **arguments: Any) -> EnvironmentWorkers:
    config = CustomEnvironmentConfig(path=f"tests.environments.broken:{name}", arguments=arguments)
    source = JsonlSource(source="jsonl", path="unused", environment=config)
    return EnvironmentWorkers(
        source, "data.train", EnvironmentRuntime(num_workers=count, timeout_seconds=LIMIT)
    )


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, Any]]:
    """All started side by side: importing is most of it."""
    started = {
        "one": workers("Misbehaves", bonus=0.5),
        "two": workers("Echo", count=2),
        "none": workers("Refuses"),
    }
    yield started
    for each in started.values():
        each.shutdown()
    stop_ray()


async def judge(environment: Any, response: str, index: int = 0) -> tuple[float, dict[str, Any]]:
    episode = copy.copy(environment)
    try:
        await episode.reset(Prompt(index, "p", token_ids([1])))
        result = await episode.step(response)
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


def test_episodes_keep_to_their_worker_and_survive_the_death_of_a_neighbour(ready: dict[str, Any]):
    environment = ready["two"].wait_ready()
    tokenizer: Any = Letters()

    async def play() -> list[Any]:
        player = EpisodePlayer(
            environment, TurnTokens(tokenizer, (1,), chat_template=True), EpisodeLimits(500, 4, None, 1)
        )

        async def sample(index: int, turn: int, ids: list[int], room: int) -> GeneratedResponse:
            text = "die" if index == 3 and turn == 1 else f"{index}"
            return GeneratedResponse(
                "", token_ids([ord(c) + 100 for c in text] + [1]), NO_LOGPROBS, "stop", 0
            )

        def episode(index: int) -> Any:
            return player.play(Prompt(index, "p", token_ids([1])), lambda *a: sample(index, *a))

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
