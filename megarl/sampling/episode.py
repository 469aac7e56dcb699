"""Episodes: turns of policy and environment, with token ids kept exactly as they were sampled.

An environment's failure never becomes a reward. The episode is retried: the turns sampled so far are replayed
to the environment, and sampling continues from where its answers differ or end. After ``max_retries``
retries the episode is dropped, with the reason.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.inference.interface import GeneratedResponse
from megarl.records import NO_LOGPROBS, FinishReason, Prompt, Sample, TokenIds, Turn, merge_spans, token_ids
from megarl.sampling.chat_continuation import ChatContinuation

if TYPE_CHECKING:
    from megarl.environments.base import EpisodeEnvironment, Observation, StepResult

# Maximum number of free restarts of an episode whose worker process another episode killed.
_MAX_BLAMELESS = 20


class EpisodeFailedError(RuntimeError):
    """An episode was dropped; the message is the environment's last failure."""


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Budgets of one episode, in tokens after the prompt, sampled and observed."""

    max_new_tokens: int
    max_turns: int = 1
    max_new_tokens_per_turn: int | None = None
    max_retries: int = 0


@dataclass(slots=True)
class _SampledTurn:
    """One sampled turn, kept across retries."""

    response: GeneratedResponse
    observation: Observation | None = None
    observed_ids: TokenIds = field(default_factory=lambda: token_ids([]))


class _EnvironmentError(Exception):
    """The environment failed or returned an invalid result."""

    def __init__(self, reason: str, *, blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless


class EpisodeRunner:
    """Run episodes of one environment, any number concurrently on one event loop.

    Args:
        environment: copied for each episode.
        turns: converts observations to token ids.
        limits: budgets and retries.
    """

    def __init__(
        self, environment: EpisodeEnvironment, turns: ChatContinuation, limits: EpisodeLimits
    ) -> None:
        self._environment, self._turns, self._limits = environment, turns, limits
        self.num_retries = 0

    async def run(
        self,
        prompt: Prompt,
        sample: Callable[[int, TokenIds, int], Awaitable[GeneratedResponse]],
    ) -> Sample:
        """Run one episode on ``prompt``; ``sample(turn, token_ids, max_new_tokens)`` asks the engine.

        Raises:
            EpisodeFailedError: the environment failed ``max_retries + 1`` times.
        """
        sampled: list[_SampledTurn] = []
        failures = blameless = 0
        while True:
            try:
                return await self._attempt(prompt, sample, sampled)
            except _EnvironmentError as error:
                if error.blameless and blameless < _MAX_BLAMELESS:
                    blameless += 1
                elif failures == self._limits.max_retries:
                    raise EpisodeFailedError(f"prompt {prompt.index}: {error}") from error
                else:
                    failures += 1
                self.num_retries += 1

    async def _attempt(
        self,
        prompt: Prompt,
        sample: Callable[[int, TokenIds, int], Awaitable[GeneratedResponse]],
        sampled: list[_SampledTurn],
    ) -> Sample:
        episode = copy.copy(self._environment)
        try:
            first: Observation = await _await_environment(episode.reset(prompt))
            if first.text != prompt.text:
                raise _EnvironmentError("reset() must return the prompt's own text: the policy reads that")
            rewards: list[float] = []
            info: dict[str, Any] = {}
            parts = [prompt.token_ids]
            used = 0
            while True:
                turn = len(rewards)
                if turn == len(sampled):
                    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
                    response = await sample(turn, ids, self._remaining_tokens(used))
                    sampled.append(_SampledTurn(response))
                parts.append(sampled[turn].response.token_ids)
                used += len(parts[-1])
                result = _validated(await _await_environment(episode.step(parts[-1])))
                rewards.append(float(result.reward))
                info.update(result.info)
                if result.done or not self._continues(used, result, sampled, turn):
                    ended = None if result.done else self._exhausted_budget(turn)
                    return self._sample(prompt, sampled[: turn + 1], rewards, info, ended)
                parts.append(sampled[turn].observed_ids)
                used += len(parts[-1])
        finally:
            episode.end()

    def _remaining_tokens(self, used: int) -> int:
        room = self._limits.max_new_tokens - used
        per_turn = self._limits.max_new_tokens_per_turn
        return room if per_turn is None else min(room, per_turn)

    def _continues(self, used: int, result: StepResult, sampled: list[_SampledTurn], turn: int) -> bool:
        """Return True if ``used`` tokens leave budget for another turn; record its observation."""
        now, seen = sampled[turn], result.observation
        assert seen is not None
        if turn + 1 == self._limits.max_turns:
            return False
        if now.observation != seen:  # new, or different from the one before a retry
            del sampled[turn + 1 :]
            now.observation = seen
            now.observed_ids = self._turns.observation(now.response.token_ids, seen.role, seen.text)
        return used + len(now.observed_ids) < self._limits.max_new_tokens

    def _exhausted_budget(self, turn: int) -> str:
        return "max_turns" if turn + 1 == self._limits.max_turns else "max_new_tokens"

    def _sample(
        self,
        prompt: Prompt,
        sampled: list[_SampledTurn],
        rewards: list[float],
        info: dict[str, Any],
        ended: str | None,
    ) -> Sample:
        """Build the sample; ``ended`` is the budget that ended the episode, None if the environment did."""
        last = sampled[-1].response
        reason: FinishReason = last.finish_reason if ended is None else "length"
        if ended is not None:
            info = info | {"ended_by": ended}
        turns: list[Turn] = []
        spans: list[tuple[int, int]] = []
        if len(sampled) == 1:
            response_ids, logprobs, spans = last.token_ids, last.logprobs, last.version_spans
        else:
            ids, values = [], []
            for index, (turn, reward) in enumerate(zip(sampled, rewards, strict=True)):
                observed = turn.observed_ids if index + 1 < len(sampled) else turn.observed_ids[:0]
                ids += [turn.response.token_ids, observed]
                if len(turn.response.logprobs):
                    values += [turn.response.logprobs, np.zeros(len(observed), np.float32)]
                turns.append(Turn(len(turn.response.token_ids), len(observed), reward))
                spans += turn.response.version_spans or [
                    (turn.response.policy_version, len(turn.response.token_ids))
                ]
                spans.append((spans[-1][0], len(observed)))
            spans = merge_spans(spans)
            response_ids = np.concatenate(ids)
            logprobs = np.concatenate(values) if values else NO_LOGPROBS
        return Sample(
            prompt.index,
            prompt.token_ids,
            response_ids,
            logprobs,
            sampled[0].response.policy_version,
            reason,
            reward=sum(rewards),
            info=info,
            turns=turns,
            experts=last.experts,  # the last turn's cover all tokens before it, which were its prompt
            version_spans=spans,
        )


async def _await_environment(answer: Awaitable[Any]) -> Any:
    """Await the environment's answer; turn any exception it raises into _EnvironmentError."""
    try:
        return await answer
    except asyncio.CancelledError:
        raise
    except Exception as error:
        blameless = bool(getattr(error, "blameless", False))
        name = "" if getattr(error, "explains_itself", False) else f"{type(error).__name__}: "
        raise _EnvironmentError(f"{name}{error}", blameless=blameless) from error


def _validated(result: StepResult) -> StepResult:
    try:
        finite = math.isfinite(float(result.reward))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise _EnvironmentError(f"it returned the reward {result.reward!r}, not a finite number")
    if result.done != (result.observation is None):
        raise _EnvironmentError("step() must return an observation exactly if the episode is not over")
    return result
