"""From prompts to graded groups: generation by the engine, overlapped with grading by the environment.

Responses are graded as they finish, while the engine works on the rest. Text is decoded where it is graded;
here only for samples that are logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.config.environments import EnvironmentRuntime
from megarl.config.online import OnlineConfig
from megarl.data.tokenizer import TurnReader, stop_token_ids
from megarl.environments.base import EpisodeEnvironment
from megarl.environments.remote import EnvironmentWorkers
from megarl.errors import UserError, see
from megarl.inference.client import SessionClient
from megarl.inference.interface import Engine, GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.metrics.console import Console
from megarl.metrics.timers import Phase, PhaseTimers
from megarl.platform import ranges
from megarl.records import Group, Prompt, Sample, TokenIds
from megarl.sampling.chat_continuation import ChatContinuation
from megarl.sampling.episode import EpisodeFailedError, EpisodeLimits, EpisodeRunner
from megarl.sampling.rollout_prefetch import EventLoopThread


def request_seed(run_seed: int, step: int, prompt_index: int, generation: int) -> int:
    """Return the sampling seed of one sample: a pure function, so a resumed run draws the same tokens."""
    name = f"{run_seed}/{step}/{prompt_index}/{generation}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


def turn_seed(run_seed: int, step: int, prompt_index: int, generation: int, turn: int) -> int:
    """Return the sampling seed of one turn of an episode; request_seed for the first turn."""
    seed = request_seed(run_seed, step, prompt_index, generation)
    return seed if turn == 0 else request_seed(seed, step, prompt_index, turn)


@dataclass(slots=True)
class RolloutCounts:
    """Counts of the environment's failures in one call of sample."""

    num_episodes: int = 0
    num_retries: int = 0
    num_dropped: int = 0
    reason: str = ""  # of the last dropped episode

    def metrics(self) -> dict[str, float]:
        """Return them under the names of metrics.jsonl."""
        return {"episodes_retried": self.num_retries, "episodes_dropped": self.num_dropped}


_GREEDY: dict[str, Any] = {"temperature": 0.0, "logprobs": False, "top_k": 0, "top_p": 1.0}
RolloutResult = tuple[list[Group], RolloutCounts, float]


class EnvironmentsFailedError(UserError):
    """More episodes were dropped than the configuration allows."""


class RolloutManager:
    """Sample groups with one engine and grade them with one environment (rank 0 only)."""

    def __init__(
        self,
        engine: Engine,
        environment: EpisodeEnvironment,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        timers: PhaseTimers,
        run_seed: int,
        runtime: EnvironmentRuntime | None = None,
        *,
        chat_template: bool = True,
    ) -> None:
        self._engine, self._environment = engine, environment
        self.note = environment.note
        """The environment's line for the log."""
        self._stop_token_ids, self._timers, self._run_seed = stop_token_ids, timers, run_seed
        self._runtime = runtime or EnvironmentRuntime()
        self._turns = ChatContinuation(tokenizer, stop_token_ids, chat_template=chat_template)
        self._text = TurnReader(tokenizer, stop_token_ids)
        self.counts = RolloutCounts()
        """Of the latest call of sample."""
        self._run: Callable[[Coroutine[Any, Any, RolloutResult]], RolloutResult] = _run

    def run_on(self, loop: EventLoopThread) -> None:
        """Sample on this event loop from now on: an environment's processes serve one loop only."""
        self._run = loop.run

    def read(self, samples: Iterable[Sample]) -> None:
        """Decode the text of samples to be logged, the way their environment decoded it."""
        for sample in samples:
            raw = bool(sample.turns) or self._environment.raw_actions
            sample.text = self._text(sample.response_ids, raw=raw)

    def sample(
        self,
        prompts: list[Prompt],
        *,
        step: int,
        generations: int,
        temperature: float,
        max_new_tokens: int,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy_too: bool = False,
        advance: Callable[[int], None] = lambda _: None,
        phase: Phase = "rollout",
    ) -> list[Group]:
        """Return one group of ``generations`` samples per prompt, in the order of ``prompts``.

        All requests are batched continuously; ``advance(1)`` is called for each finished sample.
        Temperature 0 is greedy and returns no logprobs. With ``greedy_too`` each group has one more response,
        its ``greedy``, at temperature 0; a group whose greedy one failed is empty.
        Time is booked under ``phase``; in a training rollout, time in which the engine idles while the
        environment works is booked under "reward".

        A sample whose environment kept failing is missing from its group (see ``counts``); a group may be
        empty.

        Raises:
            EnvironmentsFailedError: more than ``runtime.max_dropped_fraction`` of the episodes failed.
        """
        work = self.generate(
            prompts,
            step=step,
            generations=generations,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            top_p=top_p,
            greedy_too=greedy_too,
            advance=advance,
        )
        with self._timers(phase):
            groups, self.counts, idle_seconds = self._run(work)
            if phase == "rollout":
                self._timers.move(phase, "reward", idle_seconds)
        return groups

    async def generate(
        self,
        prompts: list[Prompt],
        *,
        step: int,
        generations: int,
        temperature: float,
        max_new_tokens: int,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy_too: bool = False,
        advance: Callable[[int], None] = lambda _: None,
    ) -> RolloutResult:
        """See :meth:`sample`; also returns the failure counts and the engine's idle seconds."""
        greedy = temperature == 0
        sampling = SamplingConfig(
            temperature, self._stop_token_ids, logprobs=not greedy, top_k=top_k, top_p=top_p
        )
        runtime = self._runtime
        limits = EpisodeLimits(
            max_new_tokens, runtime.max_turns, runtime.max_new_tokens_per_turn, runtime.max_retries
        )
        runner = EpisodeRunner(self._environment, self._turns, limits)
        count = len(prompts) * generations
        counts = RolloutCounts(num_episodes=count + len(prompts) * greedy_too)

        def finished(_: object) -> None:
            advance(1)
            ranges.tick()

        clients = [SessionClient(self._engine, sampling)]
        if greedy_too:
            clients.append(SessionClient(self._engine, replace(sampling, **_GREEDY)))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [
                        group.create_task(
                            self._episode(runner, clients[0], counts, prompt, step, number, greedy)
                        )
                        for number in range(p, count, len(prompts))
                    ]
                    for p, prompt in enumerate(prompts)
                ]
                greedy_tasks = [
                    group.create_task(self._episode(runner, client, counts, prompt, step, number, True))
                    for client in clients[1:]
                    for number, prompt in enumerate(prompts, start=count)
                ]
                for task in (task for row in [*tasks, greedy_tasks] for task in row):
                    task.add_done_callback(finished)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for client in clients:
                client.close()
        counts.num_retries = runner.num_retries
        samples = [[task.result() for task in row] for row in tasks]
        best = [task.result() for task in greedy_tasks] if greedy_too else [None] * len(prompts)
        groups = [
            Group(prompt, [s for s in row if s is not None and (one or not greedy_too)], one)
            for prompt, row, one in zip(prompts, samples, best, strict=True)
        ]
        return groups, counts, min(client.idle_seconds() for client in clients)

    async def _episode(
        self,
        runner: EpisodeRunner,
        client: SessionClient,
        counts: RolloutCounts,
        prompt: Prompt,
        step: int,
        number: int,
        greedy: bool,
    ) -> Sample | None:
        """Run one episode; None if it was dropped. ``number`` identifies it within the step."""

        async def ask(turn: int, ids: TokenIds, room: int) -> GeneratedResponse:
            seed = None if greedy else turn_seed(self._run_seed, step, prompt.index, number, turn)
            lineage = (prompt.index, number)
            return await client.generate(GenerateRequest(f"{step}-{number}-{turn}", ids, room, seed, lineage))

        try:
            return await runner.run(prompt, ask)
        except EpisodeFailedError as error:
            self._drop(counts, error)
            return None

    def _drop(self, counts: RolloutCounts, error: EpisodeFailedError) -> None:
        limit = self._runtime.max_dropped_fraction
        counts.num_dropped += 1
        counts.reason = str(error)
        if counts.num_dropped > limit * counts.num_episodes:
            raise EnvironmentsFailedError(
                f"the environment failed {counts.num_dropped} of {counts.num_episodes} episodes, more than"
                f" rollout.environments.max_dropped_fraction = {limit:g} allows; the last: {counts.reason}"
                + see("dropped-episodes")
            )


def _run(work: Coroutine[Any, Any, RolloutResult]) -> RolloutResult:
    """Like asyncio.run, but the main task has no result: Python formats it when restoring SIGINT."""
    found: list[RolloutResult] = []

    async def keep() -> None:
        found.append(await work)

    asyncio.run(keep())
    return found[0]


def make_rollout_manager(
    config: OnlineConfig,
    engine: Engine,
    workers: EnvironmentWorkers,
    tokenizer: PreTrainedTokenizerBase,
    timers: PhaseTimers,
) -> RolloutManager:
    """Build the rollouts of a training run; waits for the environment's processes."""
    return RolloutManager(
        engine,
        workers.wait_ready(),
        tokenizer,
        tuple(stop_token_ids(tokenizer, config.model.path)),
        timers,
        config.run.seed,
        config.rollout.environments,
        chat_template=bool(config.data.format.chat_template),
    )


def usable(
    groups: list[Group], counts: RolloutCounts, console: Console, *, smallest: int = 2
) -> tuple[list[Group], dict[str, float]]:
    """Return the groups that can be trained on, and counts of what was dropped.

    A group needs ``smallest`` samples: a sample alone in its group has no baseline; 1 if no baseline is used.
    """
    kept = [group for group in groups if len(group.samples) >= smallest]
    dropped = len(groups) - len(kept)
    if counts.num_dropped:
        console.warn(
            f"{counts.num_dropped} of {counts.num_episodes} episodes dropped, their environment failed"
            f" ({dropped} groups dropped with fewer than {smallest} samples left); the last:"
            f" {counts.reason}"
        )
    if not kept:
        raise EnvironmentsFailedError(
            f"the environment's failures left no group with {smallest} samples; the last: {counts.reason}"
        )
    values = counts.metrics() | {"groups_dropped": dropped}
    turns = [len(sample.turns) or 1 for group in kept for sample in group.samples]
    if max(turns) > 1:
        values |= {"turns_mean": sum(turns) / len(turns), "turns_max": max(turns)}
    return kept, values


def split_groups(groups: list[Group], parts: int) -> list[list[Sample]]:
    """Split samples into ``parts`` optimizer steps of about equally many whole groups.

    Returns fewer parts if there are fewer groups.
    """
    parts = min(parts, len(groups))
    edges = [len(groups) * i // parts for i in range(parts + 1)]
    return [
        [sample for group in groups[start:end] for sample in group.samples]
        for start, end in itertools.pairwise(edges)
    ]


def sample_row(step: int, group: Group, sample: Sample) -> dict[str, Any]:
    """Return the row of samples/step_N.jsonl shared by training and evaluation samples."""
    return {
        "step": step,
        "prompt_index": sample.prompt_index,
        "prompt": group.prompt.text,
        "response": sample.text,
        "answer": group.prompt.metadata.get("answer"),
        "reward": sample.reward,
        "finish_reason": sample.finish_reason,
        "turns": [
            {"sampled": turn.num_sampled, "observed": turn.num_observed, "reward": turn.reward}
            for turn in sample.turns
        ],
    }
