"""The online loop without models: when it evaluates and ends, what sleeps meanwhile, what is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.evaluation import EvaluationSizeConfig
from megarl.config.grpo import GrpoConfig
from megarl.loops import online
from megarl.loops.evaluation import evaluate
from megarl.loops.online import OnlineLoop
from megarl.metrics.console import Console
from megarl.metrics.timers import PhaseTimers
from megarl.records import Group, Prompt
from megarl.sampling import rollout_manager
from tests.sampling.test_episode import Breaks, Counting, Letters, Scripted, prompt, rollouts, talk

GYM = {"source": "reasoning_gym", "task": "chain_sum"}


def make_config(**sections: dict[str, Any]) -> GrpoConfig:
    config: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"path": "unused"},
        "optimizer": {"lr": 1e-3},
        "data": {"train": GYM, "held_out": {**GYM, "size": 400, "seed": 9_000_000}},
        "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_new_tokens": 8},
        "training": {"num_steps": 5},
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    return GrpoConfig.model_validate(config)


class Collector:
    position = 0

    def collect(self, step: int, describe: Any) -> tuple[list[Group], dict[str, float]]:
        return [], {"num_response_tokens": 1.0}

    def close(self) -> None: ...


def run_of(steps: list[int]) -> Any:
    """What the loop needs of a TrainingRun; records the steps that are through."""
    return SimpleNamespace(
        timers=PhaseTimers(),
        console=SimpleNamespace(note=print, warn=print, detail=print, end_steps=lambda: None),
        begin_steps=lambda: None,
        check=lambda step, values: None,
        log=lambda step, values: None,
        after_step=lambda step, last, trained, state: steps.append(step),
        finish=lambda summary: None,
        seconds_so_far=lambda: 0.0,
        memory=SimpleNamespace(measure=lambda trained: None),
        kind="grpo",
        directory=None,
    )


def loop_of(config: GrpoConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int], list[Any]]:
    """A loop, the steps it has taken, and what happened to memory."""
    steps: list[int] = []
    slept: list[Any] = []
    trained = SimpleNamespace(
        sleep=lambda parts: slept.append(("trainer sleeps", *parts)),
        wake=lambda: slept.append(("trainer wakes",)),
    )
    metrics = {"num_tokens": 1.0}
    learned = SimpleNamespace(metrics=metrics, mismatch=SimpleNamespace(metrics=dict))
    learner = SimpleNamespace(trained=trained, notes=list, learn=lambda step, groups: learned)
    engine = SimpleNamespace(
        sleep=lambda: slept.append(("engine sleeps",)), wake=lambda: slept.append(("engine wakes",))
    )
    monkeypatch.setattr(online, "barrier", lambda: None)
    monkeypatch.setattr(online, "RolloutBatches", lambda *args, **kwargs: Collector())
    train: Any = SimpleNamespace(curriculum=None, stream=None)
    policy: Any = SimpleNamespace()
    loop = OnlineLoop(config, run_of(steps), policy, learner, None, engine, train, [], None)  # type: ignore[arg-type]
    monkeypatch.setattr(loop, "sync_weights", lambda step: {"weights_bytes_moved": 0.0})
    monkeypatch.setattr(loop, "_warn_on_mismatch", lambda step, mismatch: None)
    monkeypatch.setattr(loop, "_log", lambda step, values, totals: None)
    return loop, steps, slept


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ({}, [0, 5]),
        ({"at_end": False}, [0]),
        ({"at_start": False}, [5]),
        ({"interval": 2, "at_end": False}, [0, 2, 4]),
        ({"interval": 3, "at_start": False, "at_end": True}, [3, 5]),
        ({"interval": 5}, [0, 5]),
    ],
)
def test_when_a_run_evaluates(
    settings: dict[str, Any], evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _, _ = loop_of(make_config(evaluation=settings), monkeypatch)
    found: list[int] = []
    monkeypatch.setattr(loop, "evaluate", lambda step: (found.append(step), {"accuracy": 0.5})[1])
    loop.run({"step": 0, "position": 0, "totals": {}})
    assert found == evaluated


@pytest.mark.parametrize(("num_steps", "begun", "taken"), [(3, 0, [1, 2, 3]), (5, 3, [4, 5]), (3, 3, [])])
def test_a_run_ends_with_its_last_step(
    num_steps: int, begun: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        training={"num_steps": num_steps}, evaluation={"at_start": False, "at_end": False, "interval": 0}
    )
    loop, steps, _ = loop_of(config, monkeypatch)
    loop.run({"step": begun, "position": 0, "totals": {}})
    assert steps == taken


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ([], [("trainer sleeps",), ("trainer wakes",)]),
        (["gradients"], [("trainer sleeps", "gradients"), ("trainer wakes",)]),
        (
            ["optimizer", "kv_cache"],
            [("trainer sleeps", "optimizer"), ("engine wakes",), ("engine sleeps",), ("trainer wakes",)],
        ),
    ],
)
def test_memory_that_is_given_to_the_other_side(
    offload: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives comes before who takes, and nothing else is touched."""
    loop, _, slept = loop_of(make_config(weights={"offload": offload}), monkeypatch)
    loop.give_memory_to("engine")
    loop.give_memory_to("trainer")
    assert slept == expected


def asked(settings: EvaluationSizeConfig, monkeypatch: pytest.MonkeyPatch, seed: int = 1) -> Any:
    """What an evaluation asks of the engine, and what it finds with answers of which a third are right."""
    made = rollouts(Breaks(-1, 0, None), talk)
    sampling: list[Any] = []
    begin = made.engine.session  # type: ignore[attr-defined]
    monkeypatch.setattr(
        made.engine,  # type: ignore[attr-defined]
        "session",
        lambda wanted: (sampling.append(wanted), begin(wanted))[1],
    )
    console = Console("eval", enabled=False)
    found = evaluate(made, [prompt(0)], settings, step=0, max_new_tokens=9, seed=seed, console=console)
    return sampling[0], found


def test_an_evaluation_samples_as_its_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, _ = asked(EvaluationSizeConfig(), monkeypatch)
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.logprobs) == (0.0, 0, 1.0, False)
    drawn, _ = asked(EvaluationSizeConfig(temperature=0.7, top_k=5, top_p=0.9), monkeypatch)
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.logprobs) == (0.7, 5, 0.9, True)


def test_consensus_over_all_subsets_or_over_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three answers one is right. In 1 of 3 pairs both are wrong; else the votes are tied, one half."""

    class OneRight(Breaks):
        async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
            self.seen[0] = self.seen.get(0, 0) + 1
            right = self.seen[0] == 1
            return float(right), {"answer": "right" if right else "wrong"}

    def consensus(**settings: Any) -> float:
        made = rollouts(OneRight(-1, 0, None), lambda request: "stop")
        config = EvaluationSizeConfig(num_samples_per_prompt=3, temperature=1.0, k=[2], **settings)
        console = Console("eval", enabled=False)
        found = evaluate(made, [prompt(0)], config, step=0, max_new_tokens=9, seed=3, console=console)
        return found.total.values["cons_at_2"]

    assert consensus(consensus="closed") == pytest.approx(2 / 3 * 1 / 2)
    assert consensus(consensus="sampled", consensus_draws=1) in (0.0, 0.5)
    assert consensus(consensus="sampled", consensus_draws=4000) == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(("own", "length"), [(None, 8), (3, 3)])
def test_the_length_of_an_evaluations_answers(
    own: int | None, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluation.max_new_tokens, else rollout.max_new_tokens."""
    config = make_config(evaluation={"max_new_tokens": own}, rollout={"max_new_tokens": 8})
    loop, _, _ = loop_of(config, monkeypatch)
    loop.rollouts, loop.problems = rollouts(Breaks(-1, 0, None), lambda request: "x" * 50), [prompt(0)]
    loop.run_.console = Console("eval", enabled=False)
    loop.run_.write_evaluation = lambda step, rows: None
    monkeypatch.setattr(online, "from_first_rank", lambda make: make())
    assert loop.evaluate(0) == {"accuracy": 1.0}
    assert [request.max_new_tokens for request in loop.rollouts.engine.requests] == [length]


def test_the_seed_of_a_run_is_that_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.data.tokenizer import TurnReader
    from tests.environments.local import LocalEnvironment

    monkeypatch.setattr(rollout_manager, "stop_token_ids", lambda tokenizer, path: (1,))
    tokenizer: Any = Letters()

    def seeds(seed: int) -> list[int | None]:
        engine: Any = Scripted(talk)
        local = LocalEnvironment(Counting(), TurnReader(tokenizer, (1,)))
        workers: Any = SimpleNamespace(wait_ready=lambda: local)
        config = make_config(run={"dir": "unused", "seed": seed})
        made = rollout_manager.make_rollout_manager(config, engine, workers, tokenizer, PhaseTimers())
        made.sample([prompt(0)], step=1, generations=2, temperature=1.0, max_new_tokens=100)
        return [request.seed for request in engine.requests]

    one, two = seeds(1), seeds(2)
    assert one == seeds(1) and len(one) == 6
    assert not set(one) & set(two)
