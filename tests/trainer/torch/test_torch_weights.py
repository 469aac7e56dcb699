"""Weights to an engine from the torch backend's parts: every element is the trainer's, after every step."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarl.inference.weight_receiver import AttachedWeights, check_plan
from megarl.layout import ParallelLayout, RankCoordinates
from megarl.models import load_architecture
from megarl.models.table import Region
from megarl.weights.memory_domain import host_id
from megarl.weights.sync_plan import ParamInfo
from tests.trainer import ranks
from tests.trainer.torch import backend_ranks
from tests.trainer.world import World
from tests.weights.plans import plan_weights

TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
SYNCS = 3
# Ranks, sections parallel and trainer, adapters.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], bool]] = {
    "one": (1, {}, {}, False),
    "one-lora": (1, {}, {}, True),
    "fsdp2": (2, {}, {}, False),
    "fsdp2-lora": (2, {}, {}, True),
    "tp2": (2, TP2, {}, False),
    "replicas2": (2, {}, {"replicate_size": 2}, False),
}

QUICK = {("llama-biases", "one"), ("qwen3-moe-mixed-tied", "tp2"), ("llama-biases", "fsdp2-lora")}
ROWS = [
    pytest.param(model, case, marks=[] if (model, case) in QUICK else pytest.mark.slow)
    for model in ("llama-biases", "qwen3-moe-mixed-tied")
    for case in CASES
    if "lora" not in case or "moe" not in model  # experts have no adapters
]


def engine_parameters(regions: list[Region]) -> dict[str, torch.Tensor]:
    """Parameters that hold the regions of one engine rank, unset."""
    shapes: dict[str, list[int]] = {}
    for region in regions:
        ends = [entry + 1 if isinstance(entry, int) else entry[1] for entry in region.index]
        known = shapes.setdefault(region.param, ends)
        shapes[region.param] = [max(pair) for pair in zip(known, ends, strict=True)]
    return {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}


@pytest.mark.parametrize(("model", "case"), ROWS)
def test_an_engine_has_the_trainers_weights(tmp_path: Path, model: str, case: str) -> None:
    from tests.models.tiny import save_model

    size, parallel, trainer, lora = CASES[case]
    save_model(model, tmp_path)
    regions = load_architecture(tmp_path).engine_regions(ParallelLayout(), RankCoordinates())
    trainers = World(size)  # their own: the memory that is read ends with them
    arguments = str(tmp_path), trainer, lora, str(tmp_path), SYNCS
    running = threading.Thread(
        target=trainers.run,
        args=(backend_ranks.offer_and_train, *arguments),
        kwargs={"parallel": parallel | {"num_processes": size}},
    )
    running.start()
    try:
        params = engine_parameters(regions)
        infos = {name: ParamInfo(tuple(param.shape), "float32") for name, param in params.items()}
        plan = plan_weights(ranks.take(tmp_path / "owners"), regions, infos, host=host_id())
        assert check_plan(plan, params) == []
        attached = AttachedWeights(plan, params)
        if case == "one":
            assert not plan.copies and not plan.peers, "the engine's parameters are the trainer's memory"
        for number in range(SYNCS):
            exported = ranks.take(tmp_path / f"exported-{number}")
            attached.copy_()
            for region in regions:
                index = tuple(i if isinstance(i, int) else slice(*i) for i in region.index)
                expected = exported[region.hf][tuple(slice(*span) for span in region.box)]
                assert np.array_equal(params[region.param][index].numpy(), expected), (number, region)
            ranks.put(tmp_path / f"read-{number}", None)
        running.join()
    finally:
        trainers.close()
