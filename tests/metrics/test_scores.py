"""Scores of graded groups against counts made by hand."""

from __future__ import annotations

import pytest

from megarl.metrics.passk import wilson_interval
from megarl.metrics.scores import score, score_by_category, table, vote_of
from megarl.records import Group, Prompt, Sample


def sample(text: str, reward: float, **info: object) -> Sample:
    return Sample(0, [1], [2], [], 0, "stop", text=text, reward=reward, info=dict(info))


def group(index: int, samples: list[Sample], category: str | None = None) -> Group:
    metadata = {} if category is None else {"category": category}
    return Group(Prompt(index, "", [1], metadata), samples)


RIGHT, WRONG = sample("the answer is 4", 1.0, answer="4"), sample("5", 0.0, answer="5")
SILENT = sample("I cannot say", 0.0, unparsed=True, detail="")
GROUPS = [
    group(0, [RIGHT, RIGHT, WRONG, SILENT], "sums"),
    group(1, [WRONG, WRONG, RIGHT, sample("6", 0.25, answer="6")], "sums"),
    group(2, [WRONG, WRONG, WRONG, WRONG], "products"),
]


def test_scores_of_three_problems() -> None:
    found = score(GROUPS, [1, 2, 4])
    assert (found.num_prompts, found.num_samples) == (3, 12)
    assert found.accuracy == pytest.approx((2 + 1 + 0) / 12)
    assert found.reward_mean == pytest.approx((2 + 1.25) / 12)
    assert found.values["pass_at_1"] == pytest.approx(found.accuracy)
    assert found.values["pass_at_2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert found.values["pass_at_4"] == pytest.approx(2 / 3)
    assert found.values["cons_at_4"] == pytest.approx(1 / 3)  # 4 leads in the first, 5 in the second
    # Pairs of the first: RR right, RW x2 tie, RS x2 right, WS wrong; of the second: WW, two W6 pairs wrong,
    # two WR and one R6 tie.
    assert found.values["cons_at_2"] == pytest.approx(((1 + 2 / 2 + 2) / 6 + (3 / 2) / 6 + 0) / 3)
    assert "cons_at_1" not in found.values
    assert found.interval_method == "bootstrap"
    assert found.interval[0] <= found.accuracy <= found.interval[1]


def test_problems_with_samples_that_could_not_be_judged() -> None:
    """A group of two counts for k up to 2 only, an empty one nowhere; both are counted as incomplete."""
    found = score([GROUPS[0], group(1, [RIGHT, WRONG]), group(2, [])], [2, 4, 8])
    assert (found.num_prompts, found.num_samples, found.num_incomplete) == (2, 6, 2)
    assert found.accuracy == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert found.values["pass_at_2"] == pytest.approx((5 / 6 + 1) / 2)
    assert found.values["pass_at_4"] == 1.0
    assert "pass_at_8" not in found.values
    assert "cons_at_8" not in found.values
    with pytest.raises(ValueError, match="no sample"):
        score([group(0, [])], [])


def test_sampled_consensus_is_near_the_closed_one_and_repeats_itself() -> None:
    closed = score(GROUPS, [2]).values["cons_at_2"]
    sampled = score(GROUPS, [2], consensus_draws=3000, seed=7)
    assert sampled.values["cons_at_2"] == pytest.approx(closed, abs=0.03)
    assert score(GROUPS, [2], consensus_draws=3000, seed=7) == sampled


def test_one_sample_per_problem_has_wilsons_interval() -> None:
    found = score([group(i, [RIGHT if i < 3 else WRONG]) for i in range(10)], [])
    assert (found.accuracy, found.values) == (0.3, {})
    assert found.interval == wilson_interval(3, 10)
    assert found.interval_method == "wilson"


def test_categories_are_scored_apart_and_shown() -> None:
    categories = score_by_category(GROUPS, [4])
    assert list(categories) == ["products", "sums"]
    assert categories["products"].accuracy == 0
    assert categories["sums"].values["pass_at_4"] == 1
    lines = table(score(GROUPS, [4]), categories)
    assert [line.split()[0] for line in lines[1:]] == ["products", "sums", "all"]
    assert "pass@4" in lines[0]
    assert score_by_category([group(0, [RIGHT])], []) == {}


def test_votes_are_answers_and_silence_is_none() -> None:
    assert vote_of(RIGHT) == ("4", True)
    assert vote_of(SILENT) is None
    assert vote_of(sample(" x ", 0.0)) == ("x", False)
    assert vote_of(sample("words", 0.0, answer="")) is None
    assert vote_of(sample("so B", 1.0, choice="B")) == ("B", True)
    assert vote_of(sample("who knows", 0.0, choice=None)) is None
