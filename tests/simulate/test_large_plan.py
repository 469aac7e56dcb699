"""Cost of a large plan: choices among replicas are prepared once, not once per layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import load_config
from megarl.config.plan import PlanConfig
from megarl.simulate.run import simulate
from megarl.weights.shard_index import ReplicaSet

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "configs/recipes/plan_qwen3_235b_a22b_128xh100_32k.yaml"


def layers_and_bytes(directory: Path, num_layers: int) -> int:
    """Plan the 235B model, cut to so many layers, to engines without expert parallelism; bytes moved."""
    directory.mkdir()
    model = json.loads((ROOT / "configs/models/qwen3_235b_a22b/config.json").read_text())
    (directory / "config.json").write_text(json.dumps(model | {"num_hidden_layers": num_layers}))
    engine = ["engine.tensor_parallel_size=8", "engine.data_parallel_size=1", "engine.expert_parallel=false"]
    config = load_config(PlanConfig, PLAN, [f"model.path={directory}", *engine], check_files=False)
    sync = simulate(config, 128).weight_sync
    assert sync is not None
    return sum(sync.traffic.network)


def test_layers_that_are_cut_alike_share_their_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    narrowed = ReplicaSet.narrowed

    def counting(self: ReplicaSet, others: Sequence[ReplicaSet]) -> Any:
        counts[-1] += len(others)
        return narrowed(self, others)

    monkeypatch.setattr(ReplicaSet, "narrowed", counting)
    moved = []
    for num_layers in (1, 5):
        counts.append(0)
        moved.append(layers_and_bytes(tmp_path / str(num_layers), num_layers))
    assert moved[1] == 5 * moved[0] > 0, "experts alone come from other hosts"
    assert 0 < counts[1] == counts[0]
