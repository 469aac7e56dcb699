"""A user's loss and advantage in training: equal to the built-in ones, under any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.algorithms import learner_ranks
from tests.algorithms.learner_ranks import make_groups
from tests.trainer.world import RankError, world

MODEL = "qwen3-tied"
OWN = "tests.losses.own"
TWO_STEPS: dict[str, Any] = {"num_optimizer_steps_per_batch": 2, "num_epochs_per_batch": 2}


def train(model_dirs: dict[str, str], algorithm: dict[str, Any], parallel: dict[str, Any]) -> list[Any]:
    size = parallel.get("num_processes", 1)
    arguments = (model_dirs[MODEL], algorithm, parallel, [make_groups(seed) for seed in (1, 2)])
    return world(size).run(learner_ranks.train, *arguments, parallel=parallel if size > 1 else None)


def assert_same(one: Any, other: Any, names: set[str]) -> None:
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(weight, other["weights"][name], rtol=0, atol=2e-6, err_msg=name)
    assert one["advantages"] == pytest.approx(other["advantages"], rel=1e-9)
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_written_by_hand_they_train_as_the_built_in_ones(model_dirs: dict[str, str]) -> None:
    own = {"loss": f"{OWN}:clipped", "advantage": f"{OWN}:centred"}
    [by_hand] = train(model_dirs, TWO_STEPS | own, {})
    [built_in] = train(model_dirs, TWO_STEPS | {"skip_zero_advantages": "off"}, {})
    assert "clip_fraction" not in by_hand["metrics"][0], "it is the built-in loss's"
    names = {"loss", "policy_loss", "advantage_mean", "grad_norm", "ratio_mean", "kl_policy", "entropy"}
    assert_same(by_hand, built_in, names)


@pytest.mark.parametrize(
    "parallel",
    [
        {"num_processes": 2},
        {"num_processes": 2, "context_parallel_size": 2},
        {"num_processes": 2, "context_parallel_size": 2, "context_split_from": 12},
        {"num_processes": 2, "tensor_parallel_size": 2},
    ],
    ids=["dp2", "cp2", "cp2-some-whole", "tp2"],
)
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_layouts_do_not_change_them(
    model_dirs: dict[str, str], parallel: dict[str, Any], aggregation: str
) -> None:
    algorithm = TWO_STEPS | {
        "loss": f"{OWN}:sequence_clipped",
        "advantage": f"{OWN}:short_first",
        "loss_aggregation": aggregation,
    }
    [alone] = train(model_dirs, algorithm, {})
    first, *_ = train(model_dirs, algorithm, parallel)
    names = {"loss", "policy_loss", "advantage_mean", "gspo_clipped", "grad_norm", "entropy"}
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    assert max(values["gspo_clipped"] for values in alone["metrics"]) > 0, "the clip is met"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("one_number", r"algorithm.advantage: tests.losses.own:one_number must return .*\[4\].*shape \[\]"),
        ("infinite", r"algorithm.advantage: tests.losses.own:infinite returned \["),
        ("nothing", r"algorithm.advantage: tests.losses.own has no nothing"),
    ],
)
def test_mistakes_in_an_advantage_are_told_in_a_line(
    model_dirs: dict[str, str], path: str, message: str
) -> None:
    with pytest.raises(RankError, match=f"UserError: {message}"):
        train(model_dirs, {"advantage": f"{OWN}:{path}"}, {})
