"""Inputs of the GRPO learner's optimizer steps, against the definitions in float64."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from megarl.records import Group, Sample
from tests.algorithms import learner_ranks
from tests.algorithms.learner_ranks import MAX_NEW_TOKENS, make_groups, with_greedy
from tests.trainer.world import world

MODEL = "qwen3-tied"
REINFORCE: dict[str, Any] = {
    "baseline": "none",
    "normalize_std": False,
    "normalize_batch": True,
    "kl_reward_coef": 0.3,
    "advantage_clip": 1.5,
    "overlong_buffer": 6,
    "overlong_penalty": 0.5,
    "max_logprob_error": 0.7,
    "positive_nll_coef": 0.1,
    "loss_aggregation": "fixed_length",
    "num_optimizer_steps_per_batch": 2,
}
RLOO: dict[str, Any] = {
    "baseline": "leave_one_out",
    "normalize_std": False,
    "kl_reward_coef": 0.3,
    "kl_reward_level": "sequence",
}
ALL: dict[str, Any] = {"skip_zero_advantages": "off"}
FILTER: dict[str, Any] = {
    "filter_overlong": True,
    "old_logprobs": "rollout",
    "loss_aggregation": "sequence",
    "skip_zero_advantages": "off",
}


def run(model_dirs: dict[str, str], algorithm: dict[str, Any], parallel: dict[str, Any]) -> list[Any]:
    size = parallel.get("num_processes", 1)
    return world(size).run(
        learner_ranks.learn, model_dirs[MODEL], algorithm, parallel, parallel=parallel if size > 1 else None
    )


def tokens_of(result: Any, part: int, number: int, sample: Sample, name: str) -> list[float]:
    start = len(sample.prompt_ids)
    return [result["seen"][part, number, start + t][name] for t in range(len(sample.response_ids))]


def penalty(sample: Sample) -> float:
    return -0.5 * max(0, len(sample.response_ids) - (MAX_NEW_TOKENS - 6)) / 6


def test_reinforce_plus_plus_and_its_neighbours(model_dirs: dict[str, str]) -> None:
    [result] = run(model_dirs, REINFORCE, {})
    groups = make_groups(2)
    parts = [[s for group in groups[i : i + 2] for s in group.samples] for i in (0, 2)]
    to_go: dict[tuple[int, int], list[float]] = {}
    kept: dict[tuple[int, int], Sample] = {}
    all_kls = []
    for p, part in enumerate(parts):
        for i, sample in enumerate(part):
            old, ref = (tokens_of(result, p, i, sample, n) for n in ("old_logprobs", "ref_logprobs"))
            errors = [abs(a - b) for a, b in zip(old, sample.rollout_logprobs, strict=True)]
            if statistics.fmean(errors) > 0.7:
                assert result["dropped"][2 * p + i // 4][i % 4] == "logprob_error"
                for name in ("loss_weights", "nll_weights", "loss_mask", "advantages"):
                    assert set(tokens_of(result, p, i, sample, name)) == {0.0}
                continue
            kls = [a - b for a, b in zip(old, ref, strict=True)]
            all_kls += kls
            reward = (sample.reward or 0.0) + penalty(sample)
            kept[p, i] = sample
            to_go[p, i] = [reward - 0.3 * sum(kls[t:]) for t in range(len(kls))]
    assert 0 < len(kept) < 16, "some are dropped, not all"
    assert result["metrics"]["dropped_logprob_error"] == 16 - len(kept)
    assert result["metrics"]["kl_reward"] == pytest.approx(statistics.fmean(all_kls), rel=1e-6)
    flat = [a for values in to_go.values() for a in values]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    clipped = 0
    for (p, i), sample in kept.items():
        standard = [(a - mean) / (deviation + 1e-6) for a in to_go[p, i]]
        expected = [max(-1.5, min(1.5, a)) for a in standard]
        clipped += sum(a != b for a, b in zip(standard, expected, strict=True))
        assert tokens_of(result, p, i, sample, "advantages") == pytest.approx(expected, rel=1e-5, abs=1e-6)
        own = [j for q, j in kept if q == p]
        assert tokens_of(result, p, i, sample, "loss_weights") == pytest.approx(
            [1 / (len(own) * MAX_NEW_TOKENS)] * len(expected), rel=1e-6
        )
        positive = sum(len(kept[p, j].response_ids) for j in own if kept[p, j].reward == 1.0)
        nll = 1 / positive if sample.reward == 1.0 else 0.0
        assert tokens_of(result, p, i, sample, "nll_weights") == pytest.approx([nll] * len(expected))
        assert result["advantages"][2 * p + i // 4][i % 4] == pytest.approx(statistics.fmean(expected))
    assert 0 < result["metrics"]["advantage_clipped_fraction"] == pytest.approx(clipped / len(flat))
    shaped = [(s.reward or 0.0) + penalty(s) for part in parts for s in part]
    assert result["metrics"]["shaped_reward_mean"] == pytest.approx(statistics.fmean(shaped))
    assert len(result["traced"]) == 16  # the samples file shows what the loss was computed from
    for (p, i), sample in kept.items():
        traced = result["traced"][8 * p + i]
        assert traced.logprobs.tolist() == tokens_of(result, p, i, sample, "old_logprobs")
        advantages = tokens_of(result, p, i, sample, "advantages")
        assert traced.advantages.tolist() == pytest.approx(advantages, rel=1e-6)


def test_samples_are_traced_with_the_weights_that_drew_them(model_dirs: dict[str, str]) -> None:
    """The optimizer step itself shows what a pass before it would; later steps have other weights."""
    [during] = run(model_dirs, ALL, {})
    [before] = run(model_dirs, ALL | {"max_logprob_error": 1e9}, {})  # needs a pass, and drops nothing
    assert sorted(during["traced"]) == sorted(before["traced"]) == list(range(16))
    for number, traced in during["traced"].items():
        other = before["traced"][number]
        np.testing.assert_allclose(traced.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(traced.entropy, other.entropy, atol=1e-5)
        assert 1 < traced.entropy.max() < math.log(300)
        assert traced.advantages is None, "a sample has one advantage"
    two_steps = {"num_optimizer_steps_per_batch": 2, "old_logprobs": "rollout"}
    [first_only] = run(model_dirs, ALL | two_steps, {})
    assert sorted(first_only["traced"]) == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"context_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_the_layout_changes_nothing(model_dirs: dict[str, str], parallel: dict[str, Any]) -> None:
    """Two ranks (data, context, pipeline) give the result of one: KL, errors and normalisation are global."""
    [one] = run(model_dirs, REINFORCE, {})
    two = run(model_dirs, REINFORCE, {"num_processes": 2, **parallel})
    assert two[0]["dropped"] == one["dropped"] and two[1]["dropped"] == []
    assert two[0]["metrics"].keys() == two[1]["metrics"].keys()
    for ours, theirs in zip(two[0]["advantages"], one["advantages"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    seen = two[0]["seen"] | two[1]["seen"]
    assert seen.keys() == one["seen"].keys()
    for at, fields in seen.items():
        assert fields["advantages"] == pytest.approx(one["seen"][at]["advantages"], rel=1e-3, abs=1e-4)
    assert two[0]["traced"].keys() == one["traced"].keys() and two[1]["traced"] == {}
    for number, traced in two[0]["traced"].items():
        other = one["traced"][number]
        for values, expected in (
            (traced.logprobs, other.logprobs),
            (traced.entropy, other.entropy),
            (traced.advantages, other.advantages),
        ):
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    for name in ("loss", "nll_positive", "grad_norm", "kl_reward", "positive_fraction"):
        assert two[0]["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3), name


def test_rloo_takes_the_kl_off_before_the_baseline(model_dirs: dict[str, str]) -> None:
    [result] = run(model_dirs, RLOO, {})
    for p, group in enumerate(make_groups(2)):
        shaped = []
        for g, sample in enumerate(group.samples):
            old, ref = (tokens_of(result, 0, 4 * p + g, sample, n) for n in ("old_logprobs", "ref_logprobs"))
            shaped.append((sample.reward or 0.0) - 0.3 * (sum(old) - sum(ref)))
        expected = [r - (sum(shaped) - r) / 3 for r in shaped]
        assert result["advantages"][p] == pytest.approx(expected, rel=1e-6)
        for g, sample in enumerate(group.samples):
            values = tokens_of(result, 0, 4 * p + g, sample, "advantages")
            assert values == pytest.approx([expected[g]] * len(values), rel=1e-6)


def test_overlong_samples_count_for_the_baseline_and_not_for_the_loss(model_dirs: dict[str, str]) -> None:
    [result] = run(model_dirs, FILTER, {})
    groups = make_groups(2)
    kept = [s for group in groups for s in group.samples if s.finish_reason == "stop"]
    assert result["metrics"]["filtered_overlong"] == 16 - len(kept) > 0
    rewards = [[s.reward or 0.0 for s in group.samples] for group in groups]
    for group, advantages in zip(rewards, result["advantages"], strict=True):
        mean, equal = statistics.fmean(group), len(set(group)) == 1
        expected = [0.0 if equal else (r - mean) / (statistics.stdev(group) + 1e-6) for r in group]
        assert advantages == pytest.approx(expected)
    for i, sample in enumerate(kept):
        weights = tokens_of(result, 0, i, sample, "loss_weights")
        assert weights == pytest.approx([1 / (len(kept) * len(weights))] * len(weights), rel=1e-6)
        # ratios are relative to the engine's logprobs
        assert tokens_of(result, 0, i, sample, "old_logprobs") == pytest.approx(
            sample.rollout_logprobs, rel=1e-6
        )
    assert result["metrics"]["ratio_max"] != 1


def test_a_step_without_any_sample_left_is_said_and_survived(model_dirs: dict[str, str]) -> None:
    [result] = run(model_dirs, {"max_logprob_error": 1e-9, "num_optimizer_steps_per_batch": 2}, {})
    assert result["metrics"]["dropped_logprob_error"] == 16
    assert "step 2: 2 optimizer step(s) have no sample in the loss" in result["warned"][-1]
    assert "loss" not in result["metrics"] and math.isfinite(result["metrics"]["tokens_per_second_train"])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
def test_what_is_dropped_is_in_no_loss_and_no_figure(model_dirs: dict[str, str], aggregation: str) -> None:
    """A step that drops samples equals the step without them: policy, KL, entropy and likelihood."""
    algorithm: dict[str, Any] = {
        "baseline": "none",
        "normalize_std": False,
        "kl_coef": 0.05,
        "entropy_coef": 0.01,
        "positive_nll_coef": 0.2,
        "loss_aggregation": aggregation,
        "num_epochs_per_batch": 2,
        "clip_high": 0.01,
    }

    def train(groups: list[Group], **more: Any) -> Any:
        [result] = world(1).run(
            learner_ranks.train, model_dirs[MODEL], algorithm | more, {"num_processes": 1}, [groups]
        )
        return result

    groups = make_groups(2)
    found = train(groups, max_logprob_error=0.7)
    dropped = iter(found["dropped"])
    assert 3 < sum(found["dropped"]) < 14, "some are dropped, not all"
    left = [Group(g.prompt, [s for s in g.samples if not next(dropped)]) for g in groups]
    expected = train([group for group in left if group.samples])
    ours, theirs = found["metrics"][0], expected["metrics"][0]
    for name in (
        *("loss", "policy_loss", "nll_positive", "kl_ref", "entropy", "advantage_mean", "grad_norm"),
        *("ratio_mean", "ratio_max", "clip_fraction", "kl_policy"),
    ):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=0, atol=2e-6, err_msg=name)
    [packed] = found["packed"]
    assert set(packed) == {i for i, gone in enumerate(found["dropped"]) if not gone}, (
        "no target of the others"
    )


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed_length"])
@pytest.mark.parametrize("correction", ["icepop", "sequence_mask"])
def test_what_a_mask_rejects_leaves_the_denominators(
    model_dirs: dict[str, str], correction: str, aggregation: str
) -> None:
    """verl's rejection with the means of what is kept: weights by hand from the logprobs that were seen."""
    low, high = (0.85, 1.2) if correction == "icepop" else (0.7, 1.35)
    algorithm = {
        "off_policy_correction": correction,
        "off_policy_low": low,
        "off_policy_high": high,
        "off_policy_denominators": "kept",
        "loss_aggregation": aggregation,
        "kl_coef": 0.1,
    }
    [result] = run(model_dirs, algorithm, {})
    samples = [s for group in make_groups(2) for s in group.samples]
    kept: list[list[bool]] = []
    for i, sample in enumerate(samples):
        old = tokens_of(result, 0, i, sample, "old_logprobs")
        drifts = [a - b for a, b in zip(old, sample.rollout_logprobs, strict=True)]
        if correction == "sequence_mask":
            drifts = [statistics.fmean(drifts)] * len(drifts)
        kept.append([low <= math.exp(drift) <= high for drift in drifts])
    total, sequences = sum(map(sum, kept)), sum(map(any, kept))
    targets = sum(map(len, kept))
    assert 0.05 < total / targets < 0.9 and sequences < len(samples)
    for i, (sample, inside) in enumerate(zip(samples, kept, strict=True)):
        each = {
            "token": 1 / total,
            "sequence": 1 / (sequences * max(sum(inside), 1)),
            "fixed_length": 1 / (sequences * MAX_NEW_TOKENS),
        }[aggregation]
        weights = [each if good else 0.0 for good in inside]
        assert tokens_of(result, 0, i, sample, "loss_weights") == pytest.approx(weights, rel=1e-6)
        assert tokens_of(result, 0, i, sample, "loss_mask") == inside
        assert result["dropped"][i // 4][i % 4] == (None if any(inside) else "off_policy")
    assert result["metrics"]["rejected_fraction"] == pytest.approx(1 - total / targets)
    assert result["metrics"]["corrected_fraction"] == 0


def test_rewards_by_name_are_normalised_before_they_are_summed(model_dirs: dict[str, str]) -> None:
    """GDPO, against its formula: what one normalised sum would not give."""
    algorithm = {"reward_weights": {"correct": 1.0, "format": 0.5}, "baseline": "leave_one_out"}
    [result] = run(model_dirs, algorithm, {})
    summed = []
    for p, group in enumerate(make_groups(2)):
        expected = [0.0] * 4
        for weight, rewards in ((1.0, [0.0, 1.0, 0.0, 1.0]), (0.5, [(p * g % 3) / 2 for g in range(4)])):
            for g, reward in enumerate(rewards):
                others = statistics.fmean(rewards[:g] + rewards[g + 1 :])
                deviation = statistics.stdev(rewards)
                expected[g] += weight * (reward - others) / (deviation + 1e-6) if deviation else 0.0
        assert result["advantages"][p] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        summed.append(expected)
        assert len(group.samples) == 4
    assert summed[0] != summed[1]


def test_opo_weighs_the_baseline_by_length(model_dirs: dict[str, str]) -> None:
    [result] = run(model_dirs, {"baseline": "length_weighted", "normalize_std": False}, {})
    for p, group in enumerate(make_groups(2)):
        lengths = [len(s.response_ids) for s in group.samples]
        rewards = [float(s.reward or 0) for s in group.samples]
        baseline = sum(n * r for n, r in zip(lengths, rewards, strict=True)) / sum(lengths)
        expected = [0.0 if p == 1 else r - baseline for r in rewards]
        assert result["advantages"][p] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("length", "divisor"), [(None, MAX_NEW_TOKENS), (5, 5)])
def test_the_length_that_a_fixed_denominator_has(
    model_dirs: dict[str, str], length: int | None, divisor: int
) -> None:
    [result] = run(model_dirs, {"loss_aggregation": "fixed_length", "loss_length": length}, {})
    weights = {fields["loss_weights"] for fields in result["seen"].values() if fields["loss_weights"]}
    trained = {number for _, number, _ in result["seen"]}
    assert len(trained) > 4
    assert max(weights) == min(weights) == pytest.approx(1 / (16 * divisor), rel=1e-6)


@pytest.mark.parametrize("buffer", [None, 6])
def test_remax_takes_the_greedy_responses_reward_off(model_dirs: dict[str, str], buffer: int | None) -> None:
    """Its penalty for length too; the greedy response is trained on by nobody."""
    settings = {"baseline": "greedy", "normalize_std": False}
    if buffer is not None:
        settings |= {"overlong_buffer": buffer, "overlong_penalty": 0.5}
    [result] = run(model_dirs, settings, {})

    def shaped(sample: Sample) -> float:
        return (sample.reward or 0.0) + (0.0 if buffer is None else penalty(sample))

    groups = [with_greedy(group) for group in make_groups(2)]
    for p, group in enumerate(groups):
        assert group.greedy is not None
        expected = [shaped(sample) - shaped(group.greedy) for sample in group.samples]
        assert result["advantages"][p] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    mean = statistics.fmean(group.greedy.reward or 0.0 for group in groups if group.greedy is not None)
    assert result["metrics"]["greedy_reward_mean"] == pytest.approx(mean)
    assert max(number for _, number, _ in result["seen"]) < 16
