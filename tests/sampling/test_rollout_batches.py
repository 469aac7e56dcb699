"""The prompts of each step, synchronous or prefetched, and the position of a resumed run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megarl import cli
from megarl.config.data import JsonlSource
from megarl.data.order import PromptOrder
from megarl.data.report import LoadReport
from megarl.data.rows import Row
from megarl.data.stream import ExampleStream, Streamed
from megarl.errors import ToldByRankZeroError, UserError
from megarl.records import Group, Prompt, Sample
from megarl.sampling import rollout_batches
from megarl.sampling.rollout_batches import RolloutBatches
from megarl.sampling.rollout_manager import RolloutCounts
from megarl.sampling.rollout_prefetch import EventLoopThread
from tests.algorithms import learner_ranks
from tests.algorithms.learner_ranks import fake_run, make_config
from tests.trainer.world import world

COUNT, SIZE = 4, 10  # prompts per step, problems


class Problems(list[Prompt]):
    is_mixture = False
    parts = ()
    stream = None


class FakeRollouts:
    """Rewards are equal within the groups of prompts with an even index."""

    greedy_too = False

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []
        self.counts = RolloutCounts()
        self.loop: EventLoopThread | None = None

    def run_on(self, loop: EventLoopThread) -> None:
        self.loop = loop

    def sample(self, prompts: list[Prompt], *, step: int, **settings: Any) -> list[Group]:
        assert settings["generations"] == 4 and settings["max_new_tokens"] == 12
        assert settings["greedy_too"] == self.greedy_too
        self.asked.append((step, [p.index for p in prompts]))
        return [
            Group(
                p,
                [
                    Sample(p.index, [1], [2], [-1.0], 0, "stop", reward=float(g * (p.index % 2)))
                    for g in (0, 1)
                ],
            )
            for p in prompts
        ]

    async def generate(self, prompts: list[Prompt], *, step: int, **settings: Any) -> Any:
        await asyncio.sleep(0.01 * (step % 2))
        return self.sample(prompts, step=step, **settings), RolloutCounts(), 0.0


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_batches, "from_first_rank", lambda make: make())


def make(step: int = 0, position: int = 0, rollout: dict[str, Any] | None = None, **algorithm: Any) -> Any:
    config = make_config("unused", algorithm, {})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout or {})})
    rollouts = FakeRollouts()
    train = Problems(Prompt(i, "", [1]) for i in range(SIZE))
    collector = RolloutBatches(config, fake_run(), rollouts, train, step=step, position=position)  # type: ignore[arg-type]
    return collector, rollouts


def expected(step: int) -> list[int]:
    return PromptOrder(SIZE, shuffle=True, seed=1).batch((step - 1) * COUNT, COUNT)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_step_gets_its_prompts_whatever_runs_ahead(staleness: int) -> None:
    collector, rollouts = make(rollout={"max_staleness": staleness})
    for step in (1, 2, 3, 4):
        groups, told = collector.collect(step)
        assert [g.prompt.index for g in groups] == expected(step)
        assert collector.position == step * COUNT
        assert told["groups_dropped"] == 0
    assert sorted(step for step, _ in rollouts.asked) == [1, 2, 3, 4], "nothing beyond the last step"
    collector.close()


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_goes_on_behind_the_last_step(staleness: int) -> None:
    collector, rollouts = make(step=2, position=2 * COUNT, rollout={"max_staleness": staleness})
    groups, _ = collector.collect(3)
    assert [g.prompt.index for g in groups] == expected(3)
    assert collector.position == 3 * COUNT
    assert dict(rollouts.asked)[3] == expected(3)
    collector.close()


class StreamedProblems(Streamed):
    """Problems of a file of SIZE rows, in windows of 3."""

    is_mixture = False
    parts = ()

    def __init__(self, path: Path) -> None:
        path.write_text('{"prompt": "a"}\n' * SIZE)
        source = JsonlSource(source="jsonl", path=str(path), streaming=True, streaming_window=3)
        self.stream = ExampleStream(source, "data.train", self.convert)

    @staticmethod
    def convert(rows: Iterable[Row], report: LoadReport, before: int) -> list[Prompt]:
        return [Prompt(index, "", [1]) for index, _ in enumerate(rows, start=before)]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_stream_goes_on_behind_the_last_step(tmp_path: Path, staleness: int) -> None:
    """From the place of the collected steps, whatever was read ahead of them."""

    def prompts(first: int, last: int, state: dict[str, Any] | None) -> tuple[list[int], dict[str, Any]]:
        train = StreamedProblems(tmp_path / "rows.jsonl")
        if state is not None:
            train.stream.restore(state)
        config = make_config("unused", {}, {})
        rollout = config.rollout.model_copy(update={"max_staleness": staleness})
        collector = RolloutBatches(
            config.model_copy(update={"rollout": rollout}),
            fake_run(),
            FakeRollouts(),  # type: ignore[arg-type]
            train,  # type: ignore[arg-type]
            step=first - 1,
            position=(first - 1) * COUNT,
        )
        steps = [collector.collect(step)[0] for step in range(first, last + 1)]
        collector.close()
        drawn = [group.prompt.index for groups in steps for group in groups]
        return drawn, json.loads(json.dumps(train.stream.place(collector.position)))

    whole, _ = prompts(1, 4, None)
    assert sorted(whole[:SIZE]) == list(range(SIZE)) and whole[:SIZE] != list(range(SIZE))
    begun, state = prompts(1, 2, None)
    assert state["first"] == 6, "the window of example 8"
    assert begun + prompts(3, 4, state)[0] == whole


def test_dynamic_sampling_draws_fresh_prompts_and_moves_on() -> None:
    collector, rollouts = make(dynamic_sampling=True)
    groups, told = collector.collect(1)
    drawn = [index for _, indices in rollouts.asked for index in indices]
    assert drawn == PromptOrder(SIZE, shuffle=True, seed=1).batch(0, len(drawn))
    assert [g.prompt.index for g in groups] == [i for i in drawn if i % 2][:COUNT]
    assert collector.position == len(drawn) == told["num_generation_batches"] * COUNT
    assert told["equal_groups"] + told["surplus_groups"] + COUNT == len(drawn)


def test_dynamic_sampling_gives_up_at_its_bound() -> None:
    collector, _ = make(dynamic_sampling=True, max_generation_batches=1)
    with pytest.raises(UserError, match="algorithm.max_generation_batches: step 1 has"):
        collector.collect(1)


def test_a_failure_on_rank_0_ends_the_others_with_it() -> None:
    """No rank waits for a failed one, and the reason is reported once."""
    first, other = world(2).run(learner_ranks.collect_and_fail, parallel={"num_processes": 2})
    assert (first[0], other[0]) == ("4", "0"), "samples are rank 0's"
    assert first[1:3] == other[1:3], "figures and position are every rank's"
    assert "('samples', 4)" in first[1] and first[2] == "4"
    assert first[3:] == ["EnvironmentsFailedError", "the environment failed 3 of 4 episodes"]
    assert other[3:] == ["ToldByRankZeroError", "the environment failed 3 of 4 episodes"]


def test_a_rank_that_rank_0_speaks_for_ends_without_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: Any) -> int:
        raise ToldByRankZeroError("said elsewhere")

    monkeypatch.setattr(cli, "_run_job", end)
    assert cli.main(["grpo", "--config", "unused.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
