"""Mixtures of tasks: shares, problems, judging; and levels that rise with accuracy and outlive a run."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
import reasoning_gym

from megarl.config.mixture import CurriculumConfig, MixtureTask, ReasoningGymMixtureSource
from megarl.environments import grade, make
from megarl.environments.curriculum import Mixture
from megarl.errors import UserError
from megarl.records import Group, Prompt, Sample

TASKS = [
    MixtureTask(task="chain_sum", weight=3.0, arguments={"allow_negation": False}),
    MixtureTask(task="gcd", weight=1.0, partial_credit=False),
]


def source(**settings: Any) -> ReasoningGymMixtureSource:
    defaults: dict[str, Any] = {"source": "reasoning_gym_mixture", "tasks": TASKS, "size": 2000, "seed": 5}
    return ReasoningGymMixtureSource(**(defaults | settings))


def prompt_of(mixture: Mixture, index: int) -> Prompt:
    entry, number, level = mixture.entry(index)
    return Prompt(index, entry["question"], [1], {"entry": entry, "task": number, "level": level})


def test_tasks_are_drawn_by_weight_and_problems_are_the_tasks_own():
    mixture = Mixture(source(), "f")
    drawn = [mixture.entry(i) for i in range(2000)]
    shares = Counter(number for _, number, _ in drawn)
    assert abs(shares[0] / 2000 - 0.75) < 3 * (0.75 * 0.25 / 2000) ** 0.5
    assert drawn == [Mixture(source(), "f").entry(i) for i in range(2000)]
    sums = reasoning_gym.create_dataset("chain_sum", seed=5, size=2000, allow_negation=False)
    gcds = reasoning_gym.create_dataset("gcd", seed=5, size=2000)
    for i in range(50):
        assert drawn[i][0] == (sums, gcds)[drawn[i][1]][i]


def test_each_problem_is_judged_by_its_task():
    mixture, environment = Mixture(source(), "f"), make(source(), "f")
    for i in range(30):
        prompt = prompt_of(mixture, i)
        reward, info = asyncio.run(grade(environment, prompt, prompt.metadata["entry"]["answer"]))
        assert reward == 1.0
        assert info["task"] == TASKS[prompt.metadata["task"]].task
        assert asyncio.run(grade(environment, prompt, "?"))[0] < 1.0


def answered(mixture: Mixture, indices: range, right: float) -> list[Group]:
    groups = []
    for i in indices:
        samples = [Sample(i, [1], [2], [0.0], 0, "stop", reward=float(g < 4 * right)) for g in range(4)]
        groups.append(Group(prompt_of(mixture, i), samples))
    return groups


def test_levels_rise_with_accuracy_task_by_task_and_outlive_the_run():
    settings = {"curriculum": CurriculumConfig(raise_at=0.75, min_samples=40), "tasks": TASKS}
    mixture = Mixture(source(**settings), "f")
    easy = [mixture.entry(i)[0]["question"] for i in range(40)]
    assert mixture.observe(answered(mixture, range(40), 0.5)) == []
    groups = answered(mixture, range(40), 0.75)
    sums = [group for group in groups if group.prompt.metadata["task"] == 0]
    [line] = mixture.observe(sums)
    assert line.startswith("chain_sum: level 1 (accuracy ")
    assert mixture.levels == [1, 0]
    assert mixture.metrics() == {"level_0_chain_sum": 1, "level_1_gcd": 0}
    # Problems drawn at the old level count no more; new ones are harder.
    assert mixture.observe(sums) == []
    hard = [mixture.entry(i)[0]["question"] for i in range(40)]
    of_sums = [i for i in range(40) if mixture.entry(i)[1] == 0]
    assert sum(len(hard[i]) for i in of_sums) > sum(len(easy[i]) for i in of_sums)
    assert [hard[i] for i in range(40) if i not in of_sums] == [
        easy[i] for i in range(40) if i not in of_sums
    ]
    other = Mixture(source(**settings), "f")
    other.load_state(mixture.state())
    assert [other.entry(i)[0]["question"] for i in range(40)] == hard
    more = answered(mixture, range(40, 60), 1.0)
    assert mixture.observe(more) == other.observe(more)
    assert mixture.state() == other.state()


def test_a_level_does_not_rise_above_the_highest():
    mixture = Mixture(source(curriculum=CurriculumConfig(min_samples=4, max_level=2), tasks=TASKS[:1]), "f")
    for start in range(0, 40, 4):
        mixture.observe(answered(mixture, range(start, start + 4), 1.0))
    assert mixture.levels == [2]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (MixtureTask(task="chain_summ"), r"f.tasks.0.task: reasoning-gym has no task 'chain_summ'"),
        (MixtureTask(task="chain_sum", arguments={"x": 1}), r"f.tasks.0.arguments.x: "),
        (
            MixtureTask(task="chain_sum", arguments={"min_terms": 2}),
            r"f.tasks.0.arguments.min_terms: set by the",
        ),
    ],
)
def test_wrong_tasks_are_named(task: MixtureTask, words: str):
    with pytest.raises(UserError, match=words):
        Mixture(source(tasks=[task], curriculum=CurriculumConfig()), "f")
