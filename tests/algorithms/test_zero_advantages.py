"""Samples without an advantage are counted but not computed: the same steps from fewer tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megarl.records import Group
from tests.algorithms import learner_ranks
from tests.algorithms.learner_ranks import MAX_NEW_TOKENS, make_groups
from tests.trainer.world import world

MODEL = "qwen3-tied"
CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"loss_aggregation": "sequence", "baseline": "leave_one_out", "filter_overlong": True},
    "fixed_length": {"loss_aggregation": "fixed_length", "normalize_std": False},
    "two_steps": {"num_optimizer_steps_per_batch": 2, "num_epochs_per_batch": 2, "advantage_clip": 0.5},
    "gspo": {"num_optimizer_steps_per_batch": 2, "ratio_level": "sequence", "off_policy_correction": "none"},
}
OFF = {"skip_zero_advantages": "off"}
EXACT = ("loss", "policy_loss", "advantage_mean", "grad_norm", "lr")


def batches() -> list[list[Group]]:
    """Three steps: one group of four without advantage; two, all of a half; and all of them."""
    steps = [make_groups(seed) for seed in range(3)]
    for step, equal in zip(steps, ({1}, {2, 3}, {0, 1, 2, 3}), strict=True):
        for p, group in enumerate(step):
            for g, sample in enumerate(group.samples):
                sample.reward = 1.0 if p in equal else float(g % 2)
    return steps


def train(
    model_dirs: dict[str, str],
    algorithm: dict[str, Any],
    steps: list[list[Group]] | None = None,
    parallel: dict[str, Any] | None = None,
) -> list[Any]:
    parallel = parallel or {}
    size = parallel.get("num_processes", 1)
    arguments = (model_dirs[MODEL], algorithm, parallel, steps or batches())
    return world(size).run(learner_ranks.train, *arguments, parallel=parallel if size > 1 else None)


def assert_same_weights(one: Any, other: Any) -> None:
    """Within rounding: a step of Adam moves a weight by about the learning rate, 1e-2."""
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(weight, other["weights"][name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_all_samples(model_dirs: dict[str, str], case: str) -> None:
    [skipping], [whole] = (train(model_dirs, CASES[case] | other) for other in ({}, OFF))
    assert_same_weights(skipping, whole)
    assert skipping["advantages"] == whole["advantages"]
    counts = [values["skipped_zero_advantage"] for values in skipping["metrics"]]
    assert counts[2] == 0, "a step without any gradient is taken as it is"
    for ours, theirs in zip(skipping["metrics"], whole["metrics"], strict=True):
        assert "skipped_zero_advantage" not in theirs
        for name in EXACT:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
    if "filter_overlong" not in CASES[case]:
        halves = CASES[case].get("num_optimizer_steps_per_batch") == 2
        assert counts[:2] == [4, 0 if halves else 8], "of a half without any gradient all is computed"
    first, all_of_first = skipping["metrics"][0], whole["metrics"][0]
    assert first["num_computed_tokens"] < all_of_first["num_computed_tokens"]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
def test_denominators_count_what_is_left_out(model_dirs: dict[str, str], aggregation: str) -> None:
    groups = batches()[0]
    [result] = train(model_dirs, {"loss_aggregation": aggregation}, [groups])
    samples = [sample for group in groups for sample in group.samples]
    [packed] = result["packed"]
    assert set(packed) == set(range(16)) - {4, 5, 6, 7}
    for i, weight in packed.items():
        length = len(samples[i].response_ids)
        denominator = {
            "token": sum(len(s.response_ids) for s in samples),
            "sequence": 16 * length,
            "fixed_length": 16 * MAX_NEW_TOKENS,
        }[aggregation]
        assert weight == pytest.approx(1 / denominator, rel=1e-6)
    kept = [samples[i] for i in packed]
    assert result["metrics"][0]["num_tokens"] == sum(s.num_tokens for s in kept)


@pytest.mark.parametrize("aggregation", ["token", "fixed_length"])
def test_what_is_averaged_is_averaged_over_what_was_computed(
    model_dirs: dict[str, str], aggregation: str
) -> None:
    """Metrics of the model's tokens equal those of a step without the other samples."""
    groups = batches()[0]
    algorithm = {"loss_aggregation": aggregation, "old_logprobs": "rollout"}  # ratios other than 1
    [part], [alone] = (
        train(model_dirs, algorithm, [chosen])
        for chosen in (groups, [g for i, g in enumerate(groups) if i != 1])
    )
    for name in ("ratio_mean", "ratio_max", "kl_policy", "clip_fraction"):
        assert part["metrics"][0][name] == pytest.approx(alone["metrics"][0][name], rel=1e-4, abs=1e-8), name
    ours, theirs = part["metrics"][0]["entropy"], alone["metrics"][0]["entropy"]
    if aggregation == "token":
        assert ours == pytest.approx(theirs, rel=1e-5)
        return
    # With a fixed length it is sum / (S L): as if the computed tokens' mean held for all the others.
    tokens = [sum(len(s.response_ids) for s in group.samples) for group in groups]
    assert ours == pytest.approx(theirs * (12 / 16) * sum(tokens) / (sum(tokens) - tokens[1]), rel=1e-4)


def test_twice_the_same_bits(model_dirs: dict[str, str]) -> None:
    [one], [two] = (train(model_dirs, CASES["two_steps"]) for _ in range(2))
    assert one["metrics"][-1]["loss"] == two["metrics"][-1]["loss"]
    for name, weight in one["weights"].items():
        assert np.array_equal(weight, two["weights"][name]), name


def test_a_single_sample_on_two_ranks(model_dirs: dict[str, str]) -> None:
    """Data-parallel ranks without a sample take part: one group, of which two samples are not truncated."""
    steps = batches()
    steps[0][1:] = [group for group in steps[0][1:] if group.prompt.index == 1]
    parallel = {"num_processes": 2}
    both = train(model_dirs, {}, steps, parallel)
    [alone] = train(model_dirs, OFF, steps)
    assert both[0]["metrics"][0]["skipped_zero_advantage"] == 4
    assert_same_weights(both[0], both[1])
    assert_same_weights(both[0], alone)


@pytest.mark.parametrize(
    "name", ["kl_coef", "kl_reward_coef", "entropy_coef", "positive_nll_coef", "max_logprob_error"]
)
def test_what_gives_them_a_gradient_keeps_them(model_dirs: dict[str, str], name: str) -> None:
    [result] = train(model_dirs, {name: 100.0 if name == "max_logprob_error" else 0.1}, batches()[:1])
    assert "skipped_zero_advantage" not in result["metrics"][0]
    assert set(result["packed"][0]) == set(range(16))
    assert f"samples with advantage 0: computed (algorithm.{name} needs them)" in result["notes"]
