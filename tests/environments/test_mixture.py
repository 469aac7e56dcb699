"""Problems of several sources graded by one environment."""

from __future__ import annotations

import asyncio
from typing import Any

from megarl.environments.base import Verifier, is_one_step
from megarl.environments.mixture import MixtureEnvironment
from megarl.records import Prompt, token_ids


class Says(Verifier):
    def __init__(self, reward: float) -> None:
        self.reward = reward

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        return self.reward, {"read": response_text}


class Talks:
    """An environment of several turns."""

    async def reset(self, prompt: Prompt) -> Any: ...

    async def step(self, action: str) -> Any: ...


def test_each_problem_is_judged_by_its_own_sources_environment() -> None:
    environment = MixtureEnvironment({"one": Says(1.0), "two": Says(2.0)})

    async def judged(source: str) -> Any:
        observation = await environment.reset(Prompt(0, "p", token_ids([1]), {"source": source}))
        assert observation.text == "p"
        return await environment.step("x")

    results = [asyncio.run(judged(source)) for source in ("two", "one")]
    assert [result.reward for result in results] == [2.0, 1.0]
    assert all(result.done and result.info == {"read": "x"} for result in results)


def test_a_mixture_of_verifiers_is_judged_in_one_step() -> None:
    assert is_one_step(Says(1.0)) and not is_one_step(Talks())
    assert is_one_step(MixtureEnvironment({"one": Says(1.0), "two": Says(2.0)}))
    assert not is_one_step(MixtureEnvironment({"one": Says(1.0), "two": Talks()}))
