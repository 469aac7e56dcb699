"""Tasks whose level rises with accuracy, alone and in a mixture, and across resumes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import yaml
from reasoning_gym.arithmetic.chain_sum import ChainSumCurriculum

from megarl.config.curriculum import CurriculumConfig
from megarl.config.data import PromptDataConfig, PromptMixtureSource, PromptReasoningGymSource
from megarl.config.evaluate import EvalConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.config.section import Section
from megarl.data.prompts import PromptDataset, load_prompts
from megarl.environments import grade, make
from megarl.environments.curriculum import Curriculum
from megarl.errors import UserError
from megarl.records import Group, Sample
from tests.config.test_validate import EVAL, GRPO

RISING = CurriculumConfig(raise_at=0.75, min_samples=40)


def gym(task: str = "chain_sum", **settings: Any) -> PromptReasoningGymSource:
    defaults: dict[str, Any] = {"source": "reasoning_gym", "task": task, "size": 200, "seed": 5}
    return PromptReasoningGymSource(**(defaults | {"curriculum": RISING} | settings))


def problems(tokenizer: Any, source: Any) -> PromptDataset:
    return load_prompts(PromptDataConfig(train=source), tokenizer, max_prompt_tokens=200, split="train")


def questions(dataset: PromptDataset, count: int = 40) -> list[str]:
    return [dataset[i].metadata["question"] for i in range(count)]


def answered(dataset: PromptDataset, indices: range, right: float) -> list[Group]:
    groups = []
    for i in indices:
        samples = [Sample(i, [1], [2], [0.0], 0, "stop", reward=float(g < 4 * right)) for g in range(4)]
        groups.append(Group(dataset[i], samples))
    return groups


def test_problems_are_those_of_the_level(tokenizer: Any) -> None:
    """Equal to reasoning-gym's own curriculum, including arguments that levels do not change."""
    dataset = problems(tokenizer, gym(arguments={"allow_negation": True}))
    levels = ChainSumCurriculum()
    for level in range(3):
        levels.set_global_level(level)
        made = levels.generate_configuration({"allow_negation": True, "seed": 5, "size": 200})
        expected = reasoning_gym.create_dataset("chain_sum", **vars(made))
        assert questions(dataset) == [expected[i]["question"] for i in range(40)]
        assert dataset[3].metadata["level"] == level
        assert dataset.curriculum is not None
        assert len(dataset.curriculum.observe(answered(dataset, range(10), 1.0))) == 1


def test_the_level_rises_with_accuracy_and_outlives_the_run(tokenizer: Any) -> None:
    dataset, other = (problems(tokenizer, gym()) for _ in range(2))
    levels, others = dataset.curriculum, other.curriculum
    assert levels is not None
    assert others is not None
    assert levels.observe(answered(dataset, range(40), 0.5)) == []
    groups = answered(dataset, range(40), 0.75)
    assert levels.observe(groups) == ["chain_sum: level 1 (accuracy 75.0% below it)"]
    assert levels.metrics() == {"level": 1}
    assert levels.observe(groups) == [], "problems drawn at the old level count no more"
    others.load_state(levels.state())
    assert questions(other) == questions(dataset)
    more = answered(dataset, range(40, 46), 1.0)
    assert levels.observe(more) == others.observe(more) == []
    assert levels.state() == others.state()
    environment = make(gym(), "f")
    for i in range(10):
        prompt = dataset[i]
        assert asyncio.run(grade(environment, prompt, prompt.metadata["answer"]))[0] == 1.0
        assert asyncio.run(grade(environment, prompt, "?"))[0] < 1.0


def test_each_source_of_a_mixture_has_its_own_level(tokenizer: Any) -> None:
    sources = {"sums": gym(), "gcd": gym("gcd"), "plain": gym("gcd", seed=900, curriculum=None)}
    source = PromptMixtureSource(source="mixture", sources=sources)
    dataset, other = problems(tokenizer, source), problems(tokenizer, source)
    levels, others = dataset.curriculum, other.curriculum
    assert levels is not None
    assert others is not None
    before = [questions(dataset[start : start + 40], 40) for start in (0, 200, 400)]  # type: ignore[arg-type]
    groups = answered(dataset, range(10), 1.0) + answered(dataset, range(200, 210), 0.5)
    groups += answered(dataset, range(400, 410), 1.0)
    assert levels.observe(groups) == ["sums: chain_sum: level 1 (accuracy 100.0% below it)"]
    assert levels.metrics() == {"level_sums": 1, "level_gcd": 0}
    after = [questions(dataset[start : start + 40], 40) for start in (0, 200, 400)]  # type: ignore[arg-type]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]
    others.load_state(levels.state())
    assert questions(other, 600) == questions(dataset, 600)
    assert [dataset[i].metadata["category"] for i in (0, 200, 400)] == ["sums", "gcd", "plain"]


def test_the_level_does_not_rise_above_the_highest(tokenizer: Any) -> None:
    dataset = problems(tokenizer, gym(curriculum=CurriculumConfig(min_samples=4, max_level=2)))
    levels = dataset.curriculum
    assert isinstance(levels, Curriculum)
    for start in range(0, 40, 4):
        levels.observe(answered(dataset, range(start, start + 4), 1.0))
    assert levels.level == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "chain_summ"}, r"f.task: reasoning-gym has no task 'chain_summ'"),
        ({"arguments": {"x": 1}}, r"f.arguments.x: "),
        ({"arguments": {"min_terms": 2}}, r"f.arguments.min_terms: set by the"),
    ],
)
def test_wrong_tasks_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Curriculum(gym(**settings), RISING, "f")


def refused(tmp_path: Path, kind: type[Section], base: dict[str, Any], overrides: list[str]) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(base))
    with pytest.raises(UserError) as error:
        load_config(kind, file, overrides, check_files=False)
    return [line.split(" [")[0] for line in str(error.value).splitlines()]


TRAIN, HELD_OUT = (f"data.{split}.curriculum.raise_at=0.5" for split in ("train", "held_out"))
REFUSED: list[tuple[list[str], str]] = [
    (
        [TRAIN, "rollout.max_staleness=1"],
        "rollout.max_staleness: data.train.curriculum chooses a step's problems from the results of the "
        "step before, which are not ready (got 1)",
    ),
    (
        [TRAIN, "algorithm.dynamic_sampling=true"],
        "data.train.curriculum: needs the accuracy over all samples, but algorithm.dynamic_sampling "
        "replaces groups that are all correct",
    ),
    (
        [TRAIN, "data.filter.max_tokens=20"],
        "data.train.curriculum: data.filter and data.on_bad_row = skip select among problems generated "
        "once, at the start; a curriculum generates them anew at each level",
    ),
    (
        [HELD_OUT],
        "data.held_out.curriculum: a curriculum applies to training only: "
        "held-out problems must stay the same",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED)
def test_what_a_curriculum_cannot_be_combined_with(overrides: list[str], line: str, tmp_path: Path) -> None:
    assert refused(tmp_path, GrpoConfig, GRPO, overrides) == [line]


def test_in_a_mixture_too_and_not_in_evaluations(tmp_path: Path) -> None:
    task = {"source": "reasoning_gym", "task": "gcd"}
    parts = {"a": task | {"curriculum": {}}, "b": task}
    mixed = GRPO | {"data": GRPO["data"] | {"train": {"source": "mixture", "sources": parts}}}
    [line] = refused(tmp_path, GrpoConfig, mixed, ["rollout.max_staleness=2"])
    assert line.startswith("rollout.max_staleness: data.train.sources.a.curriculum chooses")
    [line] = refused(tmp_path, EvalConfig, EVAL, [HELD_OUT])
    assert line.startswith("data.held_out.curriculum: a curriculum applies to training only")


def test_the_kind_that_was_folded_names_what_replaces_it(tmp_path: Path) -> None:
    old = {"source": "reasoning_gym_mixture", "tasks": [{"task": "gcd"}]}
    [line] = refused(tmp_path, GrpoConfig, GRPO | {"data": GRPO["data"] | {"train": old}}, [])
    assert line == (
        "data.train.source: expected 'reasoning_gym' or 'jsonl' or 'file' or 'hf' or 'benchmark' or "
        "'mixture' or 'environment'; use a mixture of reasoning_gym sources, each with its own curriculum "
        "(got 'reasoning_gym_mixture')"
    )
