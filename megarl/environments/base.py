"""The environment protocol: an episode is one ``reset`` and then ``step`` until ``done``.

A verifier is an environment of one step: the action is the whole response, the reward its score.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megarl.records import Prompt, TokenIds


@dataclass(frozen=True, slots=True)
class Observation:
    """What the policy reads next: the text of the prompt, or of the environment's turn.

    ``role`` is the chat message's that carries it: "user", or "tool" for what a tool returned.
    """

    text: str
    role: str = "user"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one action led to. ``observation`` is None exactly when the episode is over."""

    observation: Observation | None
    reward: float
    done: bool
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem that an environment makes itself, by ``problem(seed)``.

    ``answer`` is the reference as text, "" where there is none; ``metadata`` joins the prompt's.
    """

    text: str
    answer: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """Plays one episode at a time.

    ``copy.copy(environment)`` gives another that plays its own episode and shares everything that
    is expensive (data sets, worker processes), so that a whole batch can be played side by side.

    ``reset`` shows the prompt's own text, which the policy has read as the prompt. An environment that
    cannot answer raises (or is ended after its time limit): the episode is played again, in the end
    dropped, and never given a reward. It may have three attributes: ``max_concurrency``, how many calls it
    can work on at a time (1 where it has none), ``raw_actions``, True where it wants special tokens in the
    text of an action, and ``one_step``, True where the first step always ends the episode (verifiers; they
    are sent many answers to a call). ``note``, where there is one, is a line for the log.
    """

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode on ``prompt``."""
        ...

    async def step(self, action: str) -> StepResult:
        """Take the policy's turn, decoded without special tokens (or as ``raw_actions`` says)."""
        ...


class EpisodeEnvironment(Protocol):
    """An environment as the driver plays it: the policy's turn as token ids, made text where it is judged.

    As with :class:`Environment`, ``copy.copy`` gives another episode.
    """

    raw_actions: bool
    note: str

    async def reset(self, prompt: Prompt) -> Observation:
        """Start an episode on ``prompt``."""
        ...

    async def step(self, sampled: TokenIds) -> StepResult:
        """Take the policy's turn [N]."""
        ...

    def end(self) -> None:
        """The episode is over, or was given up."""
        ...


class VerifierError(RuntimeError):
    """A verifier broke. Never turned into a reward: a silent 0 would be learned from."""


class Verifier(ABC):
    """An environment of one step; subclasses say how a response is judged."""

    _prompt: Prompt | None = None

    async def reset(self, prompt: Prompt) -> Observation:
        """Remember the problem to judge by; the observation is the prompt's own text."""
        self._prompt = prompt
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        """Judge the whole response; always the last step of its episode."""
        assert self._prompt is not None, "step() before reset()"
        prompt, self._prompt = self._prompt, None
        reward, info = await self.judge(prompt, action)
        return StepResult(observation=None, reward=reward, done=True, info=info)

    @abstractmethod
    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """The response's reward, usually in [0, 1], and what to show people beside it."""


def is_one_step(environment: Environment) -> bool:
    """Whether the first step ends the episode, and reset shows the prompt: verifiers, and what says so."""
    return isinstance(environment, Verifier) or bool(getattr(environment, "one_step", False))


async def grade(environment: Environment, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
    """Judge one response in an episode of its own; safe to run for many samples side by side.

    Returns:
        The reward (finite) and the environment's info.

    Raises:
        VerifierError: the environment raised, wants more than one turn, or returned a reward that
            is not a finite number; the message names the prompt.
    """
    episode = copy.copy(environment)
    try:
        await episode.reset(prompt)
        result = await episode.step(response_text)
    except Exception as error:
        raise VerifierError(
            f"prompt {prompt.index}: the verifier raised {type(error).__name__}: {error}"
        ) from error
    if not result.done:
        raise VerifierError(f"prompt {prompt.index}: the environment wants more turns; grade() plays one")
    reward = float(result.reward)
    if not math.isfinite(reward):
        raise VerifierError(f"prompt {prompt.index}: the verifier returned the reward {reward}")
    return reward, result.info
