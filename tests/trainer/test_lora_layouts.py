"""Low-rank adapters under parallel layouts, each against one rank; checkpoints between layouts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer import lora_ranks, ranks
from tests.trainer.test_lora import ALL, ATTENTION, random_values
from tests.trainer.world import world

DENSE, MOE = "llama-deep-tied", "qwen3-moe"
LORA = {DENSE: ALL, MOE: ATTENTION}
TP2 = {"tensor_parallel_size": 2}
SP = TP2 | {"sequence_parallel": True}
PP2, CP2, EP2 = ({f"{name}_parallel_size": 2} for name in ("pipeline", "context", "expert"))
VPP2 = PP2 | {"virtual_pipeline_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True}
GATHER = OVERLAP | {"overlap_param_gather": True}
STEPS = [0, 1, 2, 3]
slow = pytest.mark.slow
ROWS = [  # model, ranks, parallel, distributed optimizer
    pytest.param(DENSE, 2, SP, False, id="tp2-sp"),
    pytest.param(DENSE, 2, {}, True, id="dp2-distributed"),
    pytest.param(DENSE, 2, TP2, False, id="tp2", marks=slow),
    pytest.param(DENSE, 2, PP2, False, id="pp2", marks=slow),
    pytest.param(DENSE, 2, VPP2, False, id="vpp2", marks=slow),
    pytest.param(DENSE, 2, CP2, False, id="cp2", marks=slow),
    pytest.param(DENSE, 2, OVERLAP, False, id="dp2-overlap", marks=slow),
    pytest.param(DENSE, 2, GATHER, True, id="dp2-distributed-overlaps", marks=slow),
    pytest.param(DENSE, 1, {"activation_recompute": "full"}, False, id="recompute-full"),
    pytest.param(DENSE, 1, {"activation_recompute": "selective"}, False, id="recompute-selective"),
    pytest.param(DENSE, 2, VPP2 | {"activation_recompute": "full"}, False, id="vpp2-recompute", marks=slow),
    pytest.param(DENSE, 4, SP | PP2, True, id="tp2-sp-pp2-distributed", marks=slow),
    pytest.param(MOE, 2, EP2, False, id="moe-ep2", marks=slow),
    pytest.param(MOE, 2, EP2, True, id="moe-ep2-distributed", marks=slow),
    pytest.param(MOE, 2, SP | EP2, False, id="moe-tp2-ep2", marks=slow),
]


@functools.cache
def one_rank(model_dir: str, name: str) -> dict[str, Any]:
    """SFT and policy steps in turn, the latter with a reference."""
    [result] = world(1).run(functools.partial(lora_ranks.train, kinds="both"), model_dir, LORA[name], STEPS)
    norms = [norm for _, norm, _ in result["log"]]
    assert np.ptp(norms) > 0.01 * max(norms), "the steps differ"
    return dict(result)


@pytest.mark.parametrize(("name", "size", "parallel", "distributed"), ROWS)
def test_layout(
    model_dirs: dict[str, str], name: str, size: int, parallel: dict[str, Any], distributed: bool
) -> None:
    """Adapters as they are made, loss and gradient norm of four steps, adapters and merged weights after."""
    expected = one_rank(model_dirs[name], name)
    results = world(size).run(
        functools.partial(lora_ranks.train, kinds="both", distributed=distributed),
        model_dirs[name],
        LORA[name],
        STEPS,
        parallel=parallel | {"num_processes": size},
    )
    assert all(result["log"] == results[0]["log"] for result in results), "every rank reports the same"
    assert np.array(results[0]["log"]) == pytest.approx(np.array(expected["log"]), rel=2e-5, abs=2e-6)
    for key, value in expected["initial"].items():
        assert np.array_equal(results[0]["initial"][key], value), key
    for kind in ("adapters", "weights"):
        assert results[0][kind].keys() == expected[kind].keys()
        for key, value in expected[kind].items():
            assert np.abs(results[0][kind][key] - value).max() < 2e-5, key


@slow
@pytest.mark.parametrize(("name", "size", "parallel", "distributed"), ROWS)
def test_gradients(
    model_dirs: dict[str, str], name: str, size: int, parallel: dict[str, Any], distributed: bool
) -> None:
    """Every rank's part of every gradient equals one rank's, and together they are all of it."""
    if distributed:
        pytest.skip("a rank has only its share of the sums")
    values = random_values(model_dirs[name], LORA[name])
    [expected] = world(1).run(lora_ranks.gradients, model_dirs[name], LORA[name], values, 5)
    parts = world(size).run(
        lora_ranks.gradients,
        model_dirs[name],
        LORA[name],
        values,
        5,
        parallel=parallel | {"num_processes": size},
    )
    ranks.assert_same_gradients(expected, parts)


@slow
@pytest.mark.parametrize(
    ("size", "parallel", "distributed"),
    [
        (1, {}, False),
        (2, SP, False),
        (2, PP2, False),
        (2, {"context_parallel_size": 2}, False),
        (2, VPP2, False),
        (2, {}, True),
        (1, {}, True),
    ],
    ids=["one", "tp2-sp", "pp2", "cp2", "vpp2", "dp2-distributed", "one-distributed"],
)
def test_resumed_elsewhere(
    model_dirs: dict[str, str], tmp_path: Path, size: int, parallel: dict[str, Any], distributed: bool
) -> None:
    """Two steps with tensor ranks, saved, two more under another layout: as if nothing had happened."""
    expected = one_rank(model_dirs[DENSE], DENSE)
    train = functools.partial(lora_ranks.train, kinds="both", distributed=distributed)
    directory = tmp_path / "step"
    directory.mkdir()
    first = world(2).run(
        functools.partial(train, save=str(directory)),
        model_dirs[DENSE],
        ALL,
        STEPS[:2],
        parallel=SP | {"num_processes": 2},
    )[0]
    second = world(size).run(
        functools.partial(train, load=str(directory)),
        model_dirs[DENSE],
        ALL,
        STEPS[2:],
        parallel=parallel | {"num_processes": size},
    )[0]
    for key, value in first["adapters"].items():
        assert np.array_equal(second["initial"][key], value), key
    log = np.array(first["log"] + second["log"])
    assert log == pytest.approx(np.array(expected["log"]), rel=2e-5, abs=2e-6)
    for key, value in expected["adapters"].items():
        assert np.abs(second["adapters"][key] - value).max() < 2e-5, key
