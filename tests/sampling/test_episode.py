"""Episodes against a scripted engine and environments that misbehave; each expected figure by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from megarl.config.environments import EnvironmentRuntime
from megarl.data.tokenizer import TurnReader
from megarl.environments.base import Observation, StepResult, Verifier
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.metrics.console import Console
from megarl.metrics.timers import PhaseTimers
from megarl.records import Group, Prompt, Sample, TokenIds, token_ids
from megarl.sampling.rollout_manager import EnvironmentsFailedError, RolloutManager, split_groups, usable
from tests.environments.local import LocalEnvironment
from tests.oracles.samples import response_mask

STOP = 1


class Letters:
    """A tokenizer of one token per character, 100 + its code; token 1 is the end of a turn."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    chat_template = "of this class"

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i - 100) if i >= 100 else "" if skip_special_tokens else "#" for i in ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [STOP if c == "#" else ord(c) + 100 for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        roles = {"user": "U", "assistant": "A"}
        return "".join(f"{roles[m['role']]}:{m['content']}#\n" for m in messages) + "A:"


class Scripted:
    """An engine that answers by a function of the request, last request first."""

    def __init__(self, answer: Callable[[GenerateRequest], str]) -> None:
        self.answer, self.requests = answer, list[GenerateRequest]()

    def session(self, sampling: SamplingConfig) -> Scripted:
        self.queue: asyncio.Queue[GeneratedResponse | None] = asyncio.Queue()
        return self

    def submit(self, requests: list[GenerateRequest]) -> None:
        for request in reversed(requests):
            self.requests.append(request)
            ids = [ord(c) + 100 for c in self.answer(request)] + [STOP]
            cut = token_ids(ids[: request.max_new_tokens])
            logprobs = np.float32([-0.5 - 0.01 * i for i in range(len(cut))])
            reason = "stop" if cut[-1] == STOP else "length"
            self.queue.put_nowait(GeneratedResponse(request.request_id, cut, logprobs, reason, 3))

    async def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        while (response := await self.queue.get()) is not None:
            yield [response]

    def close(self) -> None:
        self.queue.put_nowait(None)


def prompt(index: int = 0) -> Prompt:
    return Prompt(index, f"p{index}", token_ids([50 + index]))


def rollouts(
    environment: Any, answer: Callable[[GenerateRequest], str], *, chat: bool = True, **runtime: Any
) -> RolloutManager:
    engine: Any = Scripted(answer)
    tokenizer: Any = Letters()
    limits = EnvironmentRuntime(**runtime)
    local = LocalEnvironment(environment, TurnReader(tokenizer, (STOP,)))
    made = RolloutManager(engine, local, tokenizer, (STOP,), PhaseTimers(), 7, limits, chat_template=chat)
    made.engine = engine  # type: ignore[attr-defined]
    return made


def sample(made: RolloutManager, prompts: int = 1, generations: int = 1, length: int = 100) -> list[Group]:
    return made.sample(
        [prompt(i) for i in range(prompts)],
        step=1,
        generations=generations,
        temperature=1.0,
        max_new_tokens=length,
    )


class Counting:
    """Answers "n=<turn>" until the policy says stop; 1 per turn, 10 at the end."""

    async def reset(self, prompt: Prompt) -> Observation:
        self.turn = 0
        return Observation(prompt.text)

    async def step(self, action: str) -> StepResult:
        self.turn += 1
        if action == "stop":
            return StepResult(None, 10.0, True, {"last": action})
        return StepResult(Observation(f"n={self.turn}"), 1.0, False)


def talk(request: GenerateRequest) -> str:
    return ["go", "on", "stop"][int(request.request_id.split("-")[-1])]


def text(ids: TokenIds) -> str:
    return "".join("#" if i == STOP else chr(i - 100) for i in ids)


def test_tokens_are_kept_as_sampled_and_observations_are_no_targets():
    made = rollouts(Counting(), talk)
    [[one]] = [group.samples for group in sample(made)]
    assert text(one.response_ids) == "go#\nU:n=1#\nA:on#\nU:n=2#\nA:stop#"
    observed = len("\nU:n=1#\nA:")
    assert response_mask(one) == [1] * 3 + [0] * observed + [1] * 3 + [0] * observed + [1] * 5
    assert [turn.reward for turn in one.turns] == [1.0, 1.0, 10.0]
    assert one.reward == 12.0
    assert one.num_sampled_tokens == 11
    for token, value, target in zip(one.response_ids, one.rollout_logprobs, response_mask(one), strict=True):
        assert (value != 0.0) == bool(target), token
    # Each request is the whole sequence so far, which is what training will see.
    for request in made.engine.requests:  # type: ignore[attr-defined]
        whole = [*one.prompt_ids, *one.response_ids]
        assert request.prompt_ids.tolist() == whole[: len(request.prompt_ids)]
    seeds = [request.seed for request in made.engine.requests]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 3


def test_a_turn_that_is_cut_off_is_ended_by_the_template():
    made = rollouts(Counting(), lambda request: "long", max_new_tokens_per_turn=2, max_turns=2)
    [[one]] = [group.samples for group in sample(made)]
    assert text(one.response_ids) == "lo#\nU:n=1#\nA:lo"
    assert one.finish_reason == "length"
    assert one.info["ended_by"] == "max_turns"
    assert one.reward == 2.0


@pytest.mark.parametrize("length", [13, 14, 20])
def test_the_token_budget_holds_for_the_whole_episode(length: int):
    made = rollouts(Counting(), lambda request: "go")
    [[one]] = [group.samples for group in sample(made, length=length)]
    assert len(one.response_ids) <= length
    assert one.finish_reason == "length"
    assert response_mask(one)[-1] == 1  # nothing is observed that nobody answers
    assert sum(response_mask(one)) == one.num_sampled_tokens


def test_text_is_made_for_those_that_are_read():
    made = rollouts(Counting(), talk)
    [[one]] = [group.samples for group in sample(made)]
    assert one.text is None
    made.read([one])
    assert one.text == "go#\nU:n=1#\nA:on#\nU:n=2#\nA:stop"  # all but the token that ended it
    short = rollouts(Counting(), lambda request: "stop")
    [[one]] = [group.samples for group in sample(short)]
    short.read([one])
    assert one.text == "stop"


def test_nothing_prints_the_samples(monkeypatch: pytest.MonkeyPatch):
    """asyncio.run would, once per step: a tenth of the driver's time with long answers."""

    printed: list[Sample] = []
    monkeypatch.setattr(Sample, "__repr__", lambda one: (printed.append(one), "")[1])
    [group] = sample(rollouts(Counting(), talk), generations=3)
    assert len(group.samples) == 3 and not printed


def test_bare_prompts_get_bare_observations():
    made = rollouts(Counting(), talk, chat=False)
    [[one]] = [group.samples for group in sample(made)]
    assert text(one.response_ids) == "go#n=1on#n=2stop#"


class Slow(Counting):
    """Waits differently per prompt; counts how many wait at once."""

    open, most = 0, 0

    async def step(self, action: str) -> StepResult:
        Slow.open += 1
        Slow.most = max(Slow.most, Slow.open)
        await asyncio.sleep(0.002)
        Slow.open -= 1
        return await super().step(action)


def test_many_episodes_side_by_side_do_not_mix():
    made = rollouts(Slow(), talk)
    groups = sample(made, prompts=5, generations=8)
    assert [len(group.samples) for group in groups] == [8] * 5
    for i, group in enumerate(groups):
        for one in group.samples:
            assert one.prompt_index == i
            assert text(one.response_ids) == "go#\nU:n=1#\nA:on#\nU:n=2#\nA:stop#"
    assert Slow.most > 10
    assert made._timers.seconds("reward") > 0


class Breaks(Verifier):
    """Fails on some prompts, the first ``times`` times it sees them."""

    def __init__(self, on: int, times: int, failure: Any) -> None:
        self.on, self.times, self.failure = on, times, failure
        self.seen: dict[int, int] = {}

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        self.seen[prompt.index] = self.seen.get(prompt.index, 0) + 1
        if prompt.index == self.on and self.seen[prompt.index] <= self.times:
            if isinstance(self.failure, BaseException):
                raise self.failure
            return self.failure, {}
        return 1.0, {}


@pytest.mark.parametrize("failure", [KeyError("x"), TimeoutError("slow"), float("nan"), "good"])
def test_a_failure_is_played_again_with_the_same_tokens(failure: Any):
    made = rollouts(Breaks(1, 1, failure), talk, max_retries=1)
    groups = sample(made, prompts=3, generations=2)
    assert [[one.reward for one in group.samples] for group in groups] == [[1.0, 1.0]] * 3
    assert len(made.engine.requests) == 6  # type: ignore[attr-defined]
    assert made.counts.metrics() == {"episodes_retried": 1, "episodes_dropped": 0}


def test_a_failure_that_stays_is_dropped_with_a_count_and_never_a_reward(
    capsys: pytest.CaptureFixture[str],
):
    made = rollouts(Breaks(1, 9, KeyError("x")), talk, max_retries=2, max_dropped_fraction=0.5)
    groups = sample(made, prompts=3, generations=4)
    # 4 episodes, 3 attempts each, of which the first 9 fail: at least one of the four comes through.
    left = len(groups[1].samples)
    assert made.counts.num_dropped == 4 - left
    assert "KeyError" in made.counts.reason
    kept, values = usable(groups, made.counts, Console("grpo"))
    assert values["episodes_dropped"] == 4 - left
    assert values["groups_dropped"] == (1 if left < 2 else 0)
    assert len(kept) == 3 - int(values["groups_dropped"])
    assert all(one.reward == 1.0 for group in kept for one in group.samples)
    assert "episodes dropped" in capsys.readouterr().out


def test_above_the_threshold_the_run_stops_with_the_reason():
    made = rollouts(Breaks(1, 99, OSError("no disk")), talk, max_retries=1, max_dropped_fraction=0.2)
    with pytest.raises(EnvironmentsFailedError, match=r"failed 3 of 12 .*max_dropped_fraction.*no disk"):
        sample(made, prompts=3, generations=4)


class Forgets(Counting):
    """Breaks once in turn 2, and answers otherwise the second time where ``other`` is set."""

    def __init__(self, other: bool) -> None:
        self.other, self.state = other, {"broken": False}

    async def step(self, action: str) -> StepResult:
        if self.turn == 1 and not self.state["broken"]:
            self.state["broken"] = True
            raise RuntimeError("lost")
        result = await super().step(action)
        if result.observation is not None and self.other and self.state["broken"]:
            return StepResult(Observation(f"m={self.turn}"), 1.0, False)
        return result


@pytest.mark.parametrize("other", [False, True])
def test_a_retried_episode_keeps_what_still_holds(other: bool):
    made = rollouts(Forgets(other), talk, max_retries=1)
    [[one]] = [group.samples for group in sample(made)]
    letter = "m" if other else "n"
    assert text(one.response_ids) == f"go#\nU:{letter}=1#\nA:on#\nU:{letter}=2#\nA:stop#"
    # Turn 2 had been sampled after n=1: kept where that was answered again, else sampled anew.
    assert len(made.engine.requests) == (4 if other else 3)  # type: ignore[attr-defined]


def test_an_engine_that_fails_ends_the_rollout():
    def refuse(request: GenerateRequest) -> str:
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        sample(rollouts(Counting(), refuse), prompts=2, generations=2)


def test_groups_are_dealt_evenly_when_some_are_missing():
    def group(i: int) -> Group:
        return Group(
            prompt(i),
            [Sample(i, token_ids([1]), token_ids([2]), np.zeros(1, np.float32), 0, "stop") for _ in range(2)],
        )

    def dealt(count: int, parts: int) -> list[list[int]]:
        return [
            [one.prompt_index for one in part[::2]]
            for part in split_groups([*map(group, range(count))], parts)
        ]

    assert dealt(8, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert dealt(7, 2) == [[0, 1, 2], [3, 4, 5, 6]]
    assert dealt(1, 2) == [[0]]


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_has_its_greedy_response(fails: bool):
    """Sampled at temperature 0 beside the others, graded like them, and no sample of the group."""

    class Lengths(Verifier):
        async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
            if fails and prompt.index == 1 and response_text == "greedy":
                raise OSError("no disk")
            return float(len(response_text)), {}

    made = rollouts(
        Lengths(),
        lambda request: "greedy" if request.seed is None else "drawn!!",
        max_retries=0,
        max_dropped_fraction=0.5,
    )
    engine: Any = made.engine  # type: ignore[attr-defined]
    asked: list[SamplingConfig] = []
    engine.session = lambda sampling: (asked.append(sampling), Scripted(engine.answer).session(sampling))[1]
    groups = made.sample(
        [prompt(0), prompt(1), prompt(2)],
        step=1,
        generations=2,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=20,
        greedy_too=True,
    )
    drawn, greedy = asked
    assert (drawn.temperature, drawn.top_p, drawn.logprobs) == (0.7, 0.9, True)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.logprobs) == (0.0, 1.0, 0, False)
    assert greedy.stop_token_ids == drawn.stop_token_ids
    assert made.counts.num_episodes == 9 and made.counts.num_dropped == int(fails)
    for group in groups:
        if fails and group.prompt.index == 1:
            assert group.samples == [] and group.greedy is None
        else:
            assert [one.reward for one in group.samples] == [7.0, 7.0]
            assert group.greedy is not None and group.greedy.reward == 6.0
    kept, _ = usable(groups, made.counts, Console("grpo", enabled=False), smallest=1)
    assert len(kept) == (2 if fails else 3)
    assert all(group.greedy is None for group in sample(rollouts(Lengths(), lambda _: "x"), prompts=2))
