"""Rewards of all samples of a step, counted, through a resume to the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from megarl.metrics.report import write_report
from megarl.metrics.rewards import MOST_VALUES, count_rewards
from megarl.run_directory import RunDirectory
from tests.metrics.test_report import GRPO, Page, grpo_line, make_run


def test_few_values_are_counted_one_by_one() -> None:
    assert count_rewards([1.0, 0.0, 0.5, 1.0, 1.0]) == {"values": [0.0, 0.5, 1.0], "counts": [1, 1, 3]}
    assert count_rewards([math.nan, 2.0, -math.inf]) == {"values": [2.0], "counts": [1], "not_finite": 2}
    assert count_rewards([]) == {"values": [], "counts": []}


def test_many_values_go_into_bins_that_hold_each_once() -> None:
    draw = random.Random(1)
    rewards = [draw.gauss(0, 3) for _ in range(1000)]
    found = count_rewards(rewards)
    assert len(found["values"]) == MOST_VALUES
    assert sum(found["counts"]) == 1000
    assert found["values"][0] == min(rewards)
    for low, count in zip(found["values"], found["counts"], strict=True):
        inside = sum(low <= reward < low + found["width"] for reward in rewards)
        assert abs(inside - count) <= 1, "the largest reward is in the last bin"


def test_a_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    for after, steps in ((None, range(1, 6)), (3, range(4, 8))):
        with RunDirectory(tmp_path) as run:
            run.open(GRPO)
            run.start_after(after)
            for step in steps:
                run.append_metrics(step, {"reward_mean": 0.5})
                run.append_rewards(step, count_rewards([step, 0.0]))
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))


def test_the_report_has_the_rewards_of_all_samples(tmp_path: Path) -> None:
    make_run(tmp_path, [grpo_line(step) for step in (1, 2)])
    (tmp_path / "rewards.jsonl").write_text('{"step":1,"values":[0,1],"counts":[300,84]}\n{"step":2,"val')
    page = Page(write_report(tmp_path).read_text())
    assert page.data["rewards"] == [{"step": 1, "values": [0, 1], "counts": [300, 84]}]
