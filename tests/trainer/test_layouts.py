"""The table of layouts: each against one rank, for SFT and GRPO batches, dense and MoE, packed and padded.

Loss and gradient norm of three optimizer steps; every gradient of the first; the same bits when run again.
The default suite has rows of it in test_parallel.py, with every metric and the final weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.trainer import layout_ranks, ranks
from tests.trainer.world import world

DENSE, MOE = "llama-deep-tied", "qwen3-moe-mixed-tied"
TP2 = {"tensor_parallel_size": 2}
SP = TP2 | {"sequence_parallel": True}
PP2, CP2, EP2 = ({f"{name}_parallel_size": 2} for name in ("pipeline", "context", "expert"))
OVERLAP = {"overlap_grad_reduce": True}
WHOLE = {"context_split_from": 20}  # of sequences of 6 to 40 tokens
Row = tuple[str, int, dict[str, Any], bool]  # name, ranks, parallel, distributed optimizer
BOTH: list[Row] = [
    ("one", 1, {}, False),
    ("tp2-sp", 2, SP, False),
    ("pp2", 2, PP2, False),
    ("cp2", 2, CP2, False),
    ("dp2-distributed", 2, {}, True),
    ("dp2-overlap", 2, OVERLAP, False),
    ("dp2-distributed-overlaps", 2, OVERLAP | {"overlap_param_gather": True}, True),
    ("recompute-full", 1, {"activation_recompute": "full"}, False),
    ("recompute-selective", 1, {"activation_recompute": "selective"}, False),
    ("tp2-pp2-sp-distributed", 4, SP | PP2, True),
    ("cp4", 4, {"context_parallel_size": 4}, False),
    ("cp2-whole", 2, CP2 | WHOLE, False),
    ("cp2-whole-overlap", 2, CP2 | WHOLE | OVERLAP, False),
    ("cp4-whole", 4, {"context_parallel_size": 4} | WHOLE, False),
    ("tp2-cp2-whole", 4, SP | CP2 | WHOLE, False),
    ("pp2-cp2-whole", 4, PP2 | CP2 | WHOLE, False),
    ("tp2-pp2-cp2", 8, SP | PP2 | CP2, False),
]
DENSE_ROWS: list[Row] = [
    ("tp2", 2, TP2, False),
    ("vpp2", 2, PP2 | {"virtual_pipeline_parallel_size": 2}, False),
    ("pp2-uneven", 2, PP2 | {"first_stage_layers": 1}, False),
    ("pp2-uneven-last", 2, PP2 | {"last_stage_layers": 1}, False),
    (
        "vpp2-overlap-recompute",
        2,
        PP2 | {"virtual_pipeline_parallel_size": 2, "activation_recompute": "full"} | OVERLAP,
        False,
    ),
    ("pp4", 4, {"pipeline_parallel_size": 4}, False),
]
MOE_ROWS: list[Row] = [
    ("ep2", 2, EP2, False),
    ("ep2-distributed", 2, EP2, True),
    ("ep2-recompute-full", 2, EP2 | {"activation_recompute": "full"}, False),
    ("tp2-ep2-sp", 2, SP | EP2, False),
    ("cp2-ep2", 2, CP2 | EP2, False),
    ("cp2-ep2-whole", 2, CP2 | EP2 | WHOLE, False),
    ("dp2-cp2-ep4-whole", 4, CP2 | {"expert_parallel_size": 4} | WHOLE, False),
    ("ep2-pp2-distributed", 4, EP2 | PP2, True),
    ("tp2-ep2-pp2-sp", 4, SP | EP2 | PP2, False),
]
CASES = [
    *[(DENSE, row) for row in BOTH + DENSE_ROWS],
    *[(MOE, row) for row in BOTH + MOE_ROWS],
]


@functools.cache
def reference(model_dir: str) -> dict[str, Any]:
    """One rank, packed."""
    [result] = world(1).run(layout_ranks.proof, model_dir, False, False)
    for log, gradients in result.values():
        assert np.ptp([norm for _, norm in log]) > 0.01, "the steps differ"
        assert all(np.isfinite(grad).all() for grad in gradients.values())
    return dict(result)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "row"), CASES, ids=[f"{m.split('-')[0]}-{row[0]}" for m, row in CASES])
def test_layout(model_dirs: dict[str, str], model: str, row: Row) -> None:
    _, size, parallel, distributed = row
    expected = reference(model_dirs[model])
    results = world(size).run(
        layout_ranks.proof, model_dirs[model], distributed, True, parallel=parallel | {"num_processes": size}
    )
    for kind in ("sft", "grpo"):
        one = np.array(expected[f"{kind}-packed"][0])
        for name in ("packed", "padded"):
            logs = [np.array(result[f"{kind}-{name}"][0]) for result in results]
            assert all(np.array_equal(log, logs[0]) for log in logs), "every rank reports the same"
            error = np.abs(logs[0] - one) / np.maximum(np.abs(one), 0.1)
            assert error.max() < 1e-5, (kind, name, error)
        for result in results:
            (log, gradients), (log_again, gradients_again) = result[f"{kind}-packed"], result[f"{kind}-again"]
            assert log == log_again, "the same bits when run again"
            for key, grad in gradients.items():
                assert np.array_equal(grad, gradients_again[key], equal_nan=True), key
        if not distributed:
            ranks.assert_same_gradients(
                expected[f"{kind}-packed"][1], [result[f"{kind}-packed"][1] for result in results]
            )
