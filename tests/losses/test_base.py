"""Weights of tokens and the mismatch between engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.losses.base import LossTokens, token_weights
from megarl.losses.logprob_mismatch import LogprobMismatch, measure_mismatch
from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence, TrainBatch


def test_token_weights_by_hand() -> None:
    sequences = [
        TokenSequence([1, 2, 3, 4], [1, 0, 1, 1]),  # 2 targets: position 0 is never one
        TokenSequence([5, 6], [1, 0]),  # none
        TokenSequence([7, 8, 9, 1, 2], [0, 1, 1, 1, 0]),  # 3
    ]
    counts = TrainBatch.of(sequences).num_targets()
    assert counts.tolist() == [2, 0, 3]
    assert token_weights(counts, "token").tolist() == [1 / 5, 0.0, 1 / 5], "none: it weighs nothing"
    assert token_weights(counts, "sequence").tolist() == [1 / 4, 0.0, 1 / 6]
    assert token_weights(counts, "fixed_length", 100).tolist() == [1 / 200, 0.0, 1 / 200]  # Dr. GRPO
    assert token_weights(counts[1:2], "fixed_length", 100).tolist() == [0.0]
    assert token_weights(counts[1:2], "token").tolist() == [0.0]
    assert token_weights(counts[1:2], "sequence").tolist() == [0.0]


def test_sft_loss_is_the_weighted_negative_log_likelihood() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.25, 0.125])
    ids = torch.zeros(3, dtype=torch.int64)
    tokens = LossTokens(logprobs, torch.tensor([1.0, 2.0, 3.0]), weights, ids, ids, None, None, None, None)
    result = sft_loss(tokens)
    assert {k: float(v) for k, v in result.sums.items()} == {"loss": 1.5, "entropy": 1.375, "weight": 0.875}
    result.loss.backward()
    assert torch.equal(logprobs.grad, -weights)


def test_agreement_names_the_worst_token() -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    rollout = torch.tensor([-1.25, -2.0, -0.5, -1.0])
    mismatch = measure_mismatch(trainer, rollout, torch.tensor([7, 8, 9, 10]), torch.tensor([0, 0, 3, 3]))
    worst = mismatch.worst
    assert worst is not None
    assert (worst.difference, worst.sequence_id, worst.label) == (2.0, 3, 10)
    assert (worst.trainer_logprob, worst.rollout_logprob) == (-3.0, -1.0)
    metrics = mismatch.metrics()
    assert metrics["logprob_abs_diff_mean"] == pytest.approx(2.25 / 4)
    assert metrics["logprob_abs_diff_max"] == 2.0
    k3 = (math.exp(0.25) - 1 - 0.25) + (math.exp(-2.0) - 1 + 2.0)
    assert metrics["kl_rollout_trainer"] == pytest.approx(k3 / 4, rel=1e-12)


def test_tokens_of_older_weights_are_summed_apart() -> None:
    torch.manual_seed(0)
    trainer, rollout = torch.randn(40), torch.randn(40)
    labels, rows, old = torch.arange(40), torch.arange(40) // 7, torch.arange(40) % 3 == 0
    trainer[0] = 100.0  # the worst, were it current
    found = measure_mismatch(trainer, rollout, labels, rows, stale=old.float())
    current = measure_mismatch(trainer[~old], rollout[~old], labels[~old], rows[~old])
    stale = measure_mismatch(trainer[old], rollout[old], labels[old], rows[old])
    assert (found.num_tokens, found.num_stale, found.worst) == (26, 14, current.worst)
    assert (found.abs_diff_sum, found.kl_sum) == pytest.approx(
        (current.abs_diff_sum, current.kl_sum), rel=1e-12
    )
    assert found.stale_abs_diff_sum == pytest.approx(stale.abs_diff_sum, rel=1e-12)
    assert found.stale_kl_sum == pytest.approx(stale.kl_sum, rel=1e-12)
    none = measure_mismatch(trainer, rollout, labels, rows, stale=torch.ones(40))
    assert (none.num_tokens, none.abs_diff_sum, none.worst, none.num_stale) == (0, 0.0, None, 40)


def test_a_mismatch_is_read_in_one_copy() -> None:
    """A scalar read by itself waits for a GPU's queue."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    ids = torch.arange(8)
    with Reads() as reads:
        measure_mismatch(torch.randn(8), torch.randn(8), ids, ids, stale=torch.ones(8))
        assert reads.count == 0
        float(torch.ones(()))
        assert reads.count == 1, "the mode sees them"


def test_agreements_add_up_however_tokens_are_split() -> None:
    torch.manual_seed(0)
    trainer, rollout = torch.randn(40), torch.randn(40)
    labels, rows = torch.arange(40), torch.arange(40) // 7
    whole = measure_mismatch(trainer, rollout, labels, rows)
    nothing = measure_mismatch(trainer[:0], rollout[:0], labels[:0], rows[:0])
    assert nothing == LogprobMismatch()
    parts = [
        measure_mismatch(trainer[s], rollout[s], labels[s], rows[s])
        for s in (slice(0, 3), slice(3, 31), slice(31, 40))
    ]
    total = sum([nothing, *parts], LogprobMismatch())
    assert total.worst == whole.worst
    assert total.num_tokens == 40
    assert total.metrics() == pytest.approx(whole.metrics(), rel=1e-12)
    reversed_total = sum(reversed(parts), LogprobMismatch())
    assert reversed_total.worst == whole.worst
    assert LogprobMismatch().metrics()["logprob_abs_diff_max"] == 0.0


def test_kl_vanishes_only_with_the_difference() -> None:
    """In float64 sums, a tiny difference is not lost to rounding: k3 is about d^2 / 2."""
    trainer = torch.full((1000,), -2.0)
    rollout = torch.full((1000,), -2.0 + 2**-12)
    metrics = measure_mismatch(
        trainer, rollout, torch.zeros(1000, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    ).metrics()
    assert metrics["kl_rollout_trainer"] == pytest.approx(2**-25, rel=1e-3)


def test_tokens_of_older_weights_are_summed_up_apart() -> None:
    trainer = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    rollout = torch.tensor([-1.5, -2.0, -0.5, -2.0])
    ids = torch.tensor([0, 0, 1, 1])
    whole = measure_mismatch(trainer[1:3], rollout[1:3], ids[1:3], ids[1:3])
    both = measure_mismatch(trainer, rollout, ids, ids, torch.tensor([1.0, 0.0, 0.0, 1.0])) + whole
    assert (both.num_tokens, both.num_stale) == (4, 2)
    assert both.worst is not None and both.worst.difference == 0.0
    values = both.metrics()
    assert values["logprob_abs_diff_mean"] == values["kl_rollout_trainer"] == 0.0
    assert values["stale_logprob_abs_diff_mean"] == (0.5 + 1.0) / 2
    k3 = [math.exp(d) - 1 - d for d in (0.5, -1.0)]
    assert values["stale_kl_rollout_trainer"] == pytest.approx(sum(k3) / 2)
    assert "stale_kl_rollout_trainer" not in whole.metrics()


def test_the_worst_token_is_the_one_that_is_no_number_in_any_order() -> None:
    """NaN is neither smaller nor larger than anything: whether max() returns it depends on the order."""
    ids = torch.tensor([0])
    parts = [
        measure_mismatch(torch.tensor([value]), torch.tensor([0.0]), ids, ids)
        for value in (-1.0, torch.nan, -2.0)
    ]
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
        metrics = sum((parts[i] for i in order), LogprobMismatch()).metrics()
        assert metrics["logprob_abs_diff_max"] != metrics["logprob_abs_diff_max"]
