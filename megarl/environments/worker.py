"""The process in which an environment runs: the body of the Ray actor that process.py starts."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megarl.environments.base import Environment, Observation, StepResult, is_one_step

if TYPE_CHECKING:
    from megarl.config.data import PromptSource
    from megarl.records import Prompt, TokenIds

_Answer = TypeVar("_Answer")

GATHER_SECONDS = 0.02
"""Time that a judgement waits for others to be sent with."""


class ReadsTurns(Protocol):
    """Makes text of the token ids of a turn (:class:`megarl.data.tokenizer.TurnReader`)."""

    def __call__(self, sampled: TokenIds, *, raw: bool = False) -> str:
        """Without special tokens, or (raw) only without the one that ended the turn."""
        ...


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """Properties of an environment that the driver reads."""

    pid: int
    host: str
    one_step: bool  # as is_one_step says
    max_concurrency: int
    raw_actions: bool
    note: str  # a line for the log, may be empty


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses to judge: n of them to some prompts, T tokens in all.

    Response i answers ``prompts[rows[i]]`` and has ``token_ids[offsets[i] : offsets[i + 1]]``.
    """

    prompts: list[Prompt]
    rows: list[int]  # [n]
    token_ids: TokenIds  # [T] int32
    offsets: npt.NDArray[np.int64]  # [n + 1]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of response ``number``: a StepResult as ray.cloudpickle has it, or why there is none."""

    number: int
    result: bytes
    failure: str = ""


class EnvironmentActor:
    """Holds one environment and its open episodes. Calls are coroutines: the driver limits how many run."""

    def __init__(
        self,
        source: PromptSource,
        field: str,
        timeout_seconds: float,
        import_paths: list[str],
        read: ReadsTurns,
    ) -> None:
        sys.path += [path for path in import_paths if path not in sys.path]  # the user's own packages
        from megarl.environments import make

        self._failure: Exception | None = None
        self._environment: Environment
        try:
            self._environment = make(source, field)
        except Exception as error:  # told by facts(): Ray would bury it in its own words
            self._failure = error
        self._timeout, self._read = timeout_seconds, read
        self._raw = self._failure is None and bool(getattr(self._environment, "raw_actions", False))
        self._slots = asyncio.Semaphore(self._max_concurrency)  # of judgements
        self._episodes: dict[str, Environment] = {}

    @property
    def _max_concurrency(self) -> int:
        return 1 if self._failure is not None else int(getattr(self._environment, "max_concurrency", 1))

    async def facts(self) -> EnvironmentFacts:
        """Sign of life, and what kind of environment this is; raises what making it raised."""
        if self._failure is not None:
            raise self._failure
        return EnvironmentFacts(
            pid=os.getpid(),
            host=socket.gethostname(),
            one_step=is_one_step(self._environment),
            max_concurrency=self._max_concurrency,
            raw_actions=self._raw,
            note=str(getattr(self._environment, "note", "")),
        )

    async def judge(self, answers: Answers) -> AsyncIterator[list[Judgement]]:
        """A verifier's whole episodes, in order, max_concurrency at a time; yields what has finished.

        Each has a time limit of its own, and its failure is its own.
        """
        judged: list[Judgement] = []
        changed = asyncio.Event()

        async def one(number: int) -> None:
            async with self._slots:
                judgement = await self._judgement(answers, number)
                judged.append(judgement)  # to the list that is there by now, not when the judging began
                changed.set()

        tasks = [asyncio.create_task(one(number)) for number in range(len(answers.rows))]
        left = len(tasks)
        while left:
            await changed.wait()
            if len(judged) < left:
                await asyncio.wait(tasks, timeout=GATHER_SECONDS)
            ready, judged = judged, []
            changed.clear()
            left -= len(ready)
            yield ready

    async def _judgement(self, answers: Answers, number: int) -> Judgement:
        from ray import cloudpickle

        prompt = answers.prompts[answers.rows[number]]
        start, end = answers.offsets[number : number + 2]
        try:
            action = self._read(answers.token_ids[start:end], raw=self._raw)
            episode: Environment = copy.copy(self._environment)
            await self._limited(episode.reset(prompt))
            result = await self._limited(episode.step(action))
            return Judgement(number, cloudpickle.dumps(result))
        except Exception as error:
            return Judgement(number, b"", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    async def reset(self, name: str, prompt: Prompt) -> Observation:
        """Open an episode."""
        self._episodes[name] = copy.copy(self._environment)
        return await self._limited(self._episodes[name].reset(prompt))

    async def step(self, name: str, sampled: TokenIds) -> StepResult:
        """One turn of an open episode."""
        action = self._read(sampled, raw=self._raw)
        return await self._limited(self._episodes[name].step(action))

    async def end(self, name: str) -> None:
        """Forget an episode."""
        self._episodes.pop(name, None)

    async def _limited(self, answer: Awaitable[_Answer]) -> _Answer:
        """Ends what waits too long; what computes too long blocks this process, and the driver ends it."""
        try:
            async with asyncio.timeout(self._timeout) as limit:
                return await answer
        except TimeoutError:
            if limit.expired():
                raise TimeoutError(f"no answer within {self._timeout:g} s") from None
            raise
