"""Two and four ranks in every layout against one rank: losses, gradient norms, all metrics, final weights."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.trainer import ranks
from tests.trainer.world import world

TP2_SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel_size": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], bool]] = {
    "dp2": ({}, False),
    "dp2-distributed-optimizer": ({}, True),
    "tp2": ({"tensor_parallel_size": 2}, False),
    "tp2-sequence-parallel": (TP2_SP, False),
    "pp2": (PP2, False),
    "cp2": ({"context_parallel_size": 2}, False),
}
LAYOUTS |= {
    f"{name}-whole": ({"context_parallel_size": 2, "context_split_from": 20} | others, distributed)
    for name, others, distributed in (
        ("cp2", {}, False),
        ("cp2-distributed", {}, True),
        ("cp2-ep2", {"expert_parallel_size": 2}, False),
        ("cp2-tp2", TP2_SP, False),
        ("cp2-pp2", PP2, False),
        ("cp2-dp2", {}, False),
        ("cp2-vpp2", PP2 | {"virtual_pipeline_parallel_size": 2}, False),
        ("cp2-ep2-recompute-full", {"expert_parallel_size": 2, "activation_recompute": "full"}, False),
        ("cp2-recompute-selective", {"activation_recompute": "selective"}, False),
    )
}
LAYOUTS |= {
    "vpp2": (PP2 | {"virtual_pipeline_parallel_size": 2}, False),
    "ep2": ({"expert_parallel_size": 2}, False),
    "ep2-distributed-optimizer": ({"expert_parallel_size": 2}, True),
    "tp2-ep2": (TP2_SP | {"expert_parallel_size": 2}, False),
    "cp2-ep2": ({"context_parallel_size": 2, "expert_parallel_size": 2}, False),
    "tp2-ep2-dp2": (TP2_SP | {"expert_parallel_size": 2}, False),
    "ep2-pp2": (PP2 | {"expert_parallel_size": 2}, True),
}
OVERLAP = {"overlap_grad_reduce": True}
LAYOUTS |= {
    "one-recompute-full": ({"activation_recompute": "full"}, False),
    "one-recompute-selective": ({"activation_recompute": "selective"}, False),
    "pp2-recompute-full": (PP2 | {"activation_recompute": "full"}, False),
    "tp2-ep2-recompute-full": (TP2_SP | {"expert_parallel_size": 2, "activation_recompute": "full"}, False),
    "pp2-uneven": (PP2 | {"first_stage_layers": 1}, False),
    "dp2-overlap": (OVERLAP, False),
    "dp2-overlap-both": (OVERLAP | {"overlap_param_gather": True}, True),
    "vpp2-overlap": (PP2 | {"virtual_pipeline_parallel_size": 2} | OVERLAP, False),
    "pp4": ({"pipeline_parallel_size": 4}, False),
    "cp4": ({"context_parallel_size": 4}, False),
    "tp2-ep2-pp2": (TP2_SP | PP2 | {"expert_parallel_size": 2}, False),
    "tp2-pp2-cp2": (TP2_SP | PP2 | {"context_parallel_size": 2}, False),
}
ONE_RANK = ("one-recompute-full", "one-recompute-selective")
FOUR_RANKS = ("tp2-ep2-dp2", "ep2-pp2", "pp4", "cp4", "tp2-ep2-pp2")
FOUR_RANKS += ("cp2-tp2-whole", "cp2-pp2-whole", "cp2-dp2-whole", "cp2-vpp2-whole")
EIGHT_RANKS = ("tp2-pp2-cp2",)
LATENT = "deepseek-v3"
MOE = "qwen3-moe-mixed-tied"
CASES = [
    # What another row has in it (sequence parallelism the plain split, an overlap plain data ranks) is slow.
    *[("qwen3-tied", name) for name in ("dp2-distributed-optimizer", "tp2-sequence-parallel", "pp2", "cp2")],
    *[("llama-biases", name) for name in ("tp2-sequence-parallel", "cp2")],
    ("llama-deep-tied", "vpp2"),
    *[(MOE, name) for name in ("ep2-distributed-optimizer", "tp2-ep2", "cp2-ep2", "ep2-pp2")],
    *[(LATENT, name) for name in ("tp2-ep2", "cp2-ep2")],
    *[("qwen3-tied", name) for name in ("one-recompute-selective", "dp2-overlap-both")],
    ("llama-biases", "pp2-recompute-full"),
    ("llama-deep-tied", "pp2-uneven"),
    ("qwen3-tied", "cp2-whole"),
    *[(name, "cp2-ep2-whole") for name in (MOE, LATENT)],
]
SLOW_CASES = [
    *[(LATENT, name) for name in ("pp2", "cp2", "ep2-distributed-optimizer", "one-recompute-full")],
    *[(LATENT, name) for name in ("one-recompute-selective", "tp2-ep2-dp2", "tp2-ep2-pp2")],
    *[("qwen3-tied", name) for name in ("dp2", "tp2", "one-recompute-full", "dp2-overlap")],
    *[("llama-biases", name) for name in ("dp2", "dp2-distributed-optimizer", "tp2", "pp2")],
    *[(MOE, name) for name in ("ep2", "pp2", "tp2-ep2-dp2", "tp2-ep2-recompute-full")],
    ("llama-deep-tied", "vpp2-overlap"),
    ("llama-deep-tied", "pp4"),
    ("qwen3-tied", "cp4"),
    (MOE, "tp2-ep2-pp2"),
    ("llama-biases", "tp2-pp2-cp2"),
    *[("llama-biases", f"cp2-{name}-whole") for name in ("distributed", "tp2", "dp2")],
    ("llama-deep-tied", "cp2-vpp2-whole"),
    ("qwen3-tied", "cp2-recompute-selective-whole"),
    *[(MOE, f"cp2-{name}-whole") for name in ("pp2", "ep2-recompute-full", "dp2")],
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]  # type: ignore[misc]
COORDINATES = {
    "dp2": (0, 0, 0, 1),
    "dp2-distributed-optimizer": (0, 0, 0, 1),
    "tp2": (1, 0, 0, 0),
    "tp2-sequence-parallel": (1, 0, 0, 0),
    "pp2": (0, 1, 0, 0),
    "cp2": (0, 0, 1, 0),
    "vpp2": (0, 1, 0, 0),
    "ep2": (0, 0, 0, 1),
    "ep2-distributed-optimizer": (0, 0, 0, 1),
    "tp2-ep2": (1, 0, 0, 0),
    "cp2-ep2": (0, 0, 1, 0),
    "tp2-ep2-dp2": (1, 0, 0, 1),  # the last rank's
    "ep2-pp2": (0, 1, 0, 1),
    "pp2-recompute-full": (0, 1, 0, 0),
    "tp2-ep2-recompute-full": (1, 0, 0, 0),
    "pp2-uneven": (0, 1, 0, 0),
    "dp2-overlap": (0, 0, 0, 1),
    "dp2-overlap-both": (0, 0, 0, 1),
    "vpp2-overlap": (0, 1, 0, 0),
    "pp4": (0, 3, 0, 0),
    "cp4": (0, 0, 3, 0),
    "tp2-ep2-pp2": (1, 1, 0, 0),
    "tp2-pp2-cp2": (1, 1, 1, 0),
    "cp2-tp2-whole": (1, 0, 1, 0),
    "cp2-pp2-whole": (0, 1, 1, 0),
    "cp2-vpp2-whole": (0, 1, 1, 0),
    "cp2-dp2-whole": (0, 0, 1, 1),
    **{
        f"cp2-{name}whole": (0, 0, 1, 0)
        for name in ("", "distributed-", "ep2-", "ep2-recompute-full-", "recompute-selective-")
    },
}


_SIZES = {1: ONE_RANK, 4: FOUR_RANKS, 8: EIGHT_RANKS}


@functools.cache
def one_rank(model_dir: str) -> dict[str, Any]:
    [result] = world(1).run(ranks.train, model_dir, [0, 1, 2, 3])
    log = result["log"]
    assert len(log) == 5
    # The comparison below is worth something only if the steps do what they are there for.
    assert log[2]["ratio_max"] == 1.0 and log[3]["ratio_max"] > 1.05
    assert log[3]["clip_fraction"] > 0.1 and log[3]["kl_ref"] > 1e-4
    assert np.ptp([step["grad_norm"] for step in log]) > 0.1
    return dict(result)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_layout_equals_one_rank(model_dirs: dict[str, str], model: str, name: str) -> None:
    expected = one_rank(model_dirs[model])
    parallel, distributed = LAYOUTS[name]
    arguments = (model_dirs[model], [0, 1, 2, 3], None, None, distributed)
    size = next((n for n, names in _SIZES.items() if name in names), 2)
    results = world(size).run(ranks.train, *arguments, parallel=parallel)
    for result in results:
        assert result["log"] == results[0]["log"], "every rank reports the same"
        assert result["coordinates"] == result["megatron_coordinates"]
    assert results[0]["coordinates"] == (0, 0, 0, 0)
    assert results[-1]["coordinates"] == COORDINATES.get(name, (0, 0, 0, 0))
    assert all(result["weights"] == {} for result in results[1:])
    placed = [ranks.take_split_counts(values) for values in results[0]["log"]]
    mixed = [min(counts) > 0 and sum(counts) == 9 for counts in placed if sum(counts) > 1]
    assert mixed == [True] * 4 if "context_split_from" in parallel else placed == [[]] * 5
    for number, (one, two) in enumerate(zip(expected["log"], results[0]["log"], strict=True)):
        assert one.keys() == two.keys()
        for key, value in one.items():
            tolerance = 1e-4 if key == "grad_norm" else 1e-5
            # abs: means of signed terms, and KLs, are differences of numbers of order 1.
            assert two[key] == pytest.approx(value, rel=tolerance, abs=2e-6), (number, key)
    for key, value in expected["weights"].items():
        assert np.abs(results[0]["weights"][key] - value).max() < 1e-5, key


def test_what_is_being_sent_is_kept(model_dirs: dict[str, str]) -> None:
    """Interleaved stages go on while a message is under way: its memory must not be freed meanwhile."""
    model = model_dirs["llama-deep-tied"]
    [(alone, _)] = world(1).run(ranks.train_and_watch_sends, model)
    parallel = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2, "num_processes": 2}
    for losses, lost in world(2).run(ranks.train_and_watch_sends, model, parallel=parallel):
        assert losses == pytest.approx(alone, rel=1e-5)
        assert lost == 0
