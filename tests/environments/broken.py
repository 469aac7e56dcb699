"""A user package of environments, most of which misbehave."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

from megarl.environments import Observation, StepResult, Verifier
from megarl.records import Prompt


class Misbehaves(Verifier):
    """Does what the response says; the reward is the answer's length otherwise."""

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        if response_text == "raise":
            raise KeyError("a field")
        if response_text == "wait":
            await asyncio.sleep(60)
        if response_text == "block":
            time.sleep(60)
        if response_text == "die":
            os._exit(3)
        if response_text == "time-out of its own":
            raise TimeoutError("my database")
        if response_text == "lock":
            return 1.0, {"lock": threading.Lock()}
        return len(response_text) + self.bonus, {"pid": os.getpid()}


class Echo:
    """Two turns: says what it heard, and its process."""

    async def reset(self, prompt: Prompt) -> Observation:
        self.heard: list[str] = []
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        self.heard.append(action)
        if action == "die":
            os._exit(3)
        if len(self.heard) == 2:
            return StepResult(None, 1.0, True, {"heard": "".join(self.heard)})
        await asyncio.sleep(0.001)
        return StepResult(Observation(f"{os.getpid()}"), 0.0, False)


class Together(Verifier):
    """Judges three at a time; says how many it was judging at once at most, and what it read."""

    max_concurrency = 3
    raw_actions = True
    open, most, judged = 0, 0, 0

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        Together.open += 1
        Together.most = max(Together.most, Together.open)
        await asyncio.sleep(0.5 if response_text == "slow" else 0.002)
        if response_text == "die":
            os._exit(3)
        Together.open -= 1
        Together.judged += 1
        place = {"most": Together.most, "place": Together.judged}
        return 1.0, {"read": response_text, "prompt": prompt.index, **place}


class Refuses:
    def __init__(self) -> None:
        raise ValueError("no such thing")

    async def reset(self, prompt: Prompt) -> Observation: ...

    async def step(self, action: str) -> StepResult: ...


not_a_class = 3
