"""Experts split over tensor ranks, the allgather dispatcher, grouped GEMM: equal to one rank, to a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer import ranks, router_ranks
from tests.trainer.test_checkpoint import assert_close
from tests.trainer.test_parallel import PP2, TP2_SP, one_rank
from tests.trainer.world import world

MOE, LATENT = "qwen3-moe-mixed-tied", "deepseek-v3"
ETP2, EP2 = {"expert_tensor_parallel_size": 2}, {"expert_parallel_size": 2}
ALL_GATHER = {"expert_dispatcher": "allgather"}
CASES: list[tuple[str, str, int, dict[str, Any], bool]] = [
    ("tp2-etp2", MOE, 2, TP2_SP | ETP2, False),
    ("ep2-allgather", MOE, 2, EP2 | ALL_GATHER, False),
]
SLOW_CASES: list[tuple[str, str, int, dict[str, Any], bool]] = [
    ("etp2-distributed-optimizer", LATENT, 2, ETP2, True),
    ("etp2-allgather", MOE, 2, ETP2 | ALL_GATHER, False),
    ("ep2-etp2", LATENT, 4, EP2 | ETP2, False),
    ("tp2-ep2-etp2", MOE, 4, TP2_SP | EP2 | ETP2, False),
    ("pp2-etp2-allgather", LATENT, 4, PP2 | ETP2 | ALL_GATHER, False),
    ("tp2-ep2-allgather", LATENT, 4, TP2_SP | EP2 | ALL_GATHER, False),
]


@pytest.mark.parametrize(
    ("name", "model", "size", "parallel", "distributed"),
    [*CASES, *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]],
)
def test_layout_of_experts_equals_one_rank(
    model_dirs: dict[str, str], name: str, model: str, size: int, parallel: dict[str, Any], distributed: bool
) -> None:
    expected = one_rank(model_dirs[model])
    arguments = (model_dirs[model], [0, 1, 2, 3], None, None, distributed)
    results = world(size).run(ranks.train, *arguments, parallel=parallel)
    assert_close(expected["log"], results[0]["log"])
    for key, value in expected["weights"].items():
        assert np.abs(results[0]["weights"][key] - value).max() < 1e-5, key


@pytest.mark.slow
def test_checkpoint_moves_between_expert_layouts(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """Two expert-tensor ranks -> two expert ranks -> one: gate and up rows find their places."""
    model = model_dirs[MOE]
    [whole] = world(1).run(ranks.train, model, [1, 3, 1, 3])
    for step in ("etp2", "ep2"):
        (tmp_path / step).mkdir()
    world(2).run(ranks.train, model, [1, 3], None, {3: str(tmp_path / "etp2")}, True, parallel=TP2_SP | ETP2)
    [one] = world(1).run(ranks.train, model, [1, 3], str(tmp_path / "etp2"), None, True)
    assert_close(whole["log"][2:], one["log"])
    two = world(2).run(
        ranks.train, model, [1], str(tmp_path / "etp2"), {1: str(tmp_path / "ep2")}, True, parallel=EP2
    )
    assert_close(whole["log"][2:3], two[0]["log"])
    again = world(2).run(ranks.train, model, [3], str(tmp_path / "ep2"), None, True, parallel=TP2_SP | ETP2)
    assert_close(whole["log"][3:], again[0]["log"])


def test_grouped_gemm_equals_the_loop() -> None:
    """Torch's kernel has a CPU form: what is shown is that the offsets say what the counts do."""
    [differences] = world(1).run(
        router_ranks.grouped_against_loop, [[3, 0, 5, 2], [0, 0, 10, 0], [10, 0, 0, 0]]
    )
    assert max(differences) < 1e-5
