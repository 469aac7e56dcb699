"""Families without a table: what is packed is what transformers computes of each sequence alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.torch import families
from tests.trainer.world import world

ROWS = {"qwen3_next"}  # a state goes along the tokens: one sequence per row
NO_PLAN = {"gpt_oss"}  # transformers has none for tensor ranks: refused


@pytest.mark.parametrize("name", families.FAMILIES)
def test_packed_logprobs_are_transformers_own_and_the_loss_falls(tmp_path: Path, name: str) -> None:
    families.save_family(name, tmp_path / name)
    sequences = families.make_sequences([23, 5, 17, 9, 12])
    [found] = world(1).run(families.packed, str(tmp_path / name), sequences)
    assert found["microbatches"] == 1
    assert found["rows"] == (name in ROWS)
    for ours, theirs in zip(found["logprobs"], families.alone(str(tmp_path / name), sequences), strict=True):
        assert abs(ours - theirs).max() < 2e-5
    assert found["losses"][-1] < found["losses"][0] - 0.3, found["losses"]
    assert found["exported"] == found["shapes"]


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in ROWS | NO_PLAN])
def test_tensor_ranks_compute_what_one_does(tmp_path: Path, name: str, sequence_parallel: bool) -> None:
    families.save_family(name, tmp_path)
    sequences = families.make_sequences([23, 5, 17, 9, 12])
    [expected] = world(1).run(families.packed, str(tmp_path), sequences)
    parallel = {"tensor_parallel_size": 2, "sequence_parallel": sequence_parallel, "num_processes": 2}
    for found in world(2).run(families.packed, str(tmp_path), sequences, parallel=parallel):
        for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
            assert abs(ours - theirs).max() < 1e-5
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
