"""From hidden states to the loss, on any layout: sequence means, the sampler's support, numerics."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer import loss_ranks
from tests.trainer.world import world

MODEL = "qwen3-tied"


def test_the_default_path_is_native(model_dirs: dict[str, str]) -> None:
    [called] = world(1).run(loss_ranks.ops_of_a_step, model_dirs[MODEL])
    assert called == {
        "pack_sequences",
        "linear_token_logprob",
        "linear_token_logprob_backward",
        "policy_loss",
        "policy_loss_backward",
    }


@pytest.mark.parametrize("parallel", [{"context_parallel_size": 2}, {"tensor_parallel_size": 2}, {}])
def test_sequence_means_over_ranks(model_dirs: dict[str, str], parallel: dict[str, Any]) -> None:
    """GSPO and the sequence mask on two ranks (context-, tensor-, data-parallel) as on one."""
    [one] = world(1).run(loss_ranks.sequence_level, model_dirs[MODEL])
    several = world(2).run(
        loss_ranks.sequence_level, model_dirs[MODEL], parallel={"num_processes": 2, **parallel}
    )[0]
    for ours, theirs in zip(several["log"], one["log"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    assert loss_ranks.differences(several["weights"], one["weights"]) < 1e-4
    log = one["log"]
    assert 0 < log[0]["corrected_fraction"] < 1, "the mask drops some sequences and keeps others"
    assert log[0]["ratio_max"] == 1 and log[2]["ratio_max"] != 1
    assert 0 < log[2]["clip_fraction"] < 1


@pytest.mark.parametrize(
    "parallel", [{"tensor_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}]
)
def test_logprobs_over_the_support_of_the_sampler(
    model_dirs: dict[str, str], parallel: dict[str, Any]
) -> None:
    path = model_dirs[MODEL]
    [sequences] = world(1).run(loss_ranks.sequences_with_truncated_logprobs, path)
    [one] = world(1).run(loss_ranks.truncated_sampling, path, sequences)
    assert one["mismatch"]["logprob_abs_diff_max"] < 1e-5
    assert one["plain"]["logprob_abs_diff_max"] > 0.1
    assert one["metrics"]["ratio_mean"] == one["metrics"]["ratio_max"] == 1
    several = world(2).run(
        loss_ranks.truncated_sampling, path, sequences, parallel={"num_processes": 2, **parallel}
    )[0]
    assert several["mismatch"]["logprob_abs_diff_max"] < 1e-5
    assert several["metrics"] == pytest.approx(one["metrics"], rel=2e-4, abs=1e-6)
    assert loss_ranks.differences(several["weights"], one["weights"]) < 1e-4


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            # attention multiplies a NaN by weights of 0 too: it spreads to every target of sequence 1
            "embedding",
            "megarl::linear_token_logprob: logprob of row {row} is nan (3 such rows): its logits hold NaN or "
            "inf, or give the target no probability; that row predicts token 3 (id 23) of sequence 1 of "
            "the step",
        ),
        (
            "old_logprobs",
            "megarl::policy_loss: old_logprobs of row {row} is inf (1 such rows); that row predicts token 3 "
            "(id 13) of sequence 0 of the step",
        ),
    ],
)
def test_check_numerics_names_the_token(model_dirs: dict[str, str], where: str, message: str) -> None:
    path = model_dirs["llama-biases"]
    [error] = world(1).run(loss_ranks.numerics, path, where, True)
    assert error in {f"debug.check_numerics: {message.format(row=row)}" for row in range(6)}
    assert world(1).run(loss_ranks.numerics, path, where, False) == [""]
