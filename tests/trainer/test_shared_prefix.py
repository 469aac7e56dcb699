"""A group's prompt computed once against the flat packing: loss, gradients, metrics, final weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megarl.batching.shared_prefix import share_prefixes
from megarl.losses.policy import PolicyLoss
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import TokenSequence, TrainBatch
from tests.trainer import ranks
from tests.trainer.world import world

TOKEN = ranks.POLICY_LOSS
BY_SEQUENCE = PolicyLoss(PolicyLossOptions(clip_low=0.02, clip_high=0.05, level="sequence"))
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
CASES: list[tuple[str, int, dict[str, Any], PolicyLoss]] = [
    ("qwen3-tied", 1, {}, TOKEN),
    ("qwen3-tied", 1, {}, BY_SEQUENCE),
    ("llama-biases", 2, {}, TOKEN),
    ("llama-biases", 2, SP, TOKEN),
    ("qwen3-tied", 2, {"pipeline_parallel_size": 2}, TOKEN),
    ("qwen3-tied", 2, {"context_parallel_size": 2}, BY_SEQUENCE),
    ("qwen3-tied", 2, {"context_parallel_size": 2, "context_split_from": 24}, BY_SEQUENCE),
    ("llama-deep-tied", 2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, TOKEN),
    ("qwen3-moe-mixed-tied", 2, {"context_parallel_size": 2, "expert_parallel_size": 2}, TOKEN),
]


@pytest.mark.parametrize(("name", "size", "parallel", "loss"), CASES)
@pytest.mark.parametrize("budget", [96, 400])
def test_sharing_changes_nothing(
    model_dirs: dict[str, str], name: str, size: int, parallel: dict[str, Any], loss: PolicyLoss, budget: int
) -> None:
    """The small budget cuts groups, the large one packs several."""
    [flat] = world(1).run(ranks.train_groups, model_dirs[name], "off", 400, loss)
    shared = world(size).run(ranks.train_groups, model_dirs[name], "auto", budget, loss, parallel=parallel)
    for number, (one, two) in enumerate(zip(flat["log"], shared[0]["log"], strict=True)):
        placed = ranks.take_split_counts(two)
        assert not placed or (min(placed) > 0 and sum(placed) == 16)
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key == "expert_load_max":  # a load counts tokens computed, of which sharing leaves fewer
                continue
            assert two[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 1e-5, abs=3e-6), (
                number,
                key,
            )
    for key, value in flat["weights"].items():
        assert np.abs(shared[0]["weights"][key] - value).max() < 1e-5, key
    if not parallel and size == 1:
        for key, value in flat["gradients"].items():
            scale = max(1e-3, np.abs(value).max())
            assert np.abs(shared[0]["gradients"][key] - value).max() < 1e-5 * scale, key
        whole = sum(len(s.token_ids) for seed in range(3) for s in ranks.make_groups(seed))
        assert flat["computed"] == whole and shared[0]["computed"] < 0.75 * whole


def test_parts_are_the_whole() -> None:
    batch = TrainBatch.of(ranks.make_groups(3))
    segments, bounds = share_prefixes(batch, np.arange(len(batch)), max_tokens=400, pad_to_multiple=1)
    assert bounds[0] == 0 and bounds[-1] == len(segments) and (np.diff(bounds) > 0).all()
    targets, seen, prefixes = batch.targets(), [], set(segments.prefixes.tolist())
    for number, (row, skip, length, prefix) in enumerate(
        zip(segments.rows, segments.skips, segments.lengths, segments.prefixes, strict=True)
    ):
        start = batch.offsets[row] + skip
        own = slice(start + 1, start + length)  # nothing predicts its first token
        if number in prefixes:
            assert not targets[own].any(), "a prefix has no targets"
            continue
        seen.append(int(row))
        whole = batch[row]
        assert skip + length == len(whole)
        assert targets[own].sum() == whole.loss_mask[1:].sum()
        if prefix >= 0:
            first = segments.rows[prefix]
            assert segments.lengths[prefix] == skip == batch.prompt_lengths[row] - 1
            assert np.array_equal(batch[first].token_ids[:skip], whole.token_ids[:skip])
            assert np.searchsorted(bounds, prefix, "right") == np.searchsorted(bounds, number, "right")
    assert seen == list(range(len(batch)))
    alone = bounds[:-1][np.diff(bounds) == 1]
    assert segments.prefixes.max() >= 0 and len(alone) and (segments.prefixes[alone] == -1).all()


def test_small_savings_are_left_alone() -> None:
    sequence = TokenSequence([1, 2] + [3] * 40, [0, 0] + [1] * 40, num_prompt_tokens=2)
    batch = TrainBatch.of([sequence] * 8)
    segments, bounds = share_prefixes(batch, np.arange(8), max_tokens=1000, pad_to_multiple=1)
    assert segments.rows.tolist() == list(range(8)) and segments.lengths.tolist() == [42] * 8
    assert set(segments.prefixes.tolist()) == {-1} and bounds.tolist() == list(range(9))
