"""Checkpoints: a new process goes on as if nothing had happened, under any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer import ranks
from tests.trainer.world import World, world

TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


def assert_close(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            tolerance = 1e-4 if key == "grad_norm" else 1e-5
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=2e-6), key


def test_a_new_process_goes_on_bit_for_bit(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """Two steps after the resume, so that moments, step count, schedule and random state all matter."""
    model = model_dirs["qwen3-tied"]
    directory = tmp_path / "step"
    directory.mkdir()
    [whole] = world(1).run(ranks.train, model, [0, 1, 2, 3], None, {1: str(directory)})
    fresh = World(1)
    try:
        [resumed] = fresh.run(ranks.train, model, [2, 3], str(directory))
    finally:
        fresh.close()
    assert resumed["log"] == whole["log"][2:]
    assert resumed["random"] == whole["random"]
    for name, value in whole["weights"].items():
        assert np.array_equal(resumed["weights"][name], value), name


@pytest.mark.parametrize("model", ["qwen3-tied", "llama-biases"])
def test_resharding_tp2_pp2_tp1(model_dirs: dict[str, str], model: str, tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("tp2", "pp2")]
    for directory in directories:
        directory.mkdir()
    tp2, pp2 = map(str, directories)
    path = model_dirs[model]
    [whole] = world(1).run(ranks.train, path, [0, 1, 2, 3, 5])
    first = world(2).run(ranks.train, path, [0, 1], None, {1: tp2}, parallel=TP2)[0]
    second = world(2).run(ranks.train, path, [2], tp2, {2: pp2}, parallel=PP2)[0]
    # One rank cannot continue the random states of two: steps 3 and 5 draw nothing.
    [third] = world(1).run(ranks.train, path, [3, 5], pp2)
    for before, after in ((first, second), (second, third)):
        assert before["weights"].keys() == after["started_with"].keys()
        for name, value in before["weights"].items():
            assert np.array_equal(after["started_with"][name], value), name
    assert_close(whole["log"], first["log"] + second["log"] + third["log"])
    for name, value in whole["weights"].items():
        assert np.abs(third["weights"][name] - value).max() < 1e-5, name


@pytest.mark.parametrize("distributed", [False, True])
def test_experts_of_two_ranks_go_on_in_one(
    model_dirs: dict[str, str], distributed: bool, tmp_path: Path
) -> None:
    path, directory = model_dirs["qwen3-moe-mixed-tied"], tmp_path / "step"
    directory.mkdir()
    [whole] = world(1).run(ranks.train, path, [0, 1, 3, 5])
    ep2 = {"expert_parallel_size": 2}
    arguments = (path, [0, 1], None, {1: str(directory)}, distributed)
    first = world(2).run(ranks.train, *arguments, parallel=ep2)[0]
    [second] = world(1).run(ranks.train, path, [3, 5], str(directory), None, distributed)
    for name, value in first["weights"].items():
        assert np.array_equal(second["started_with"][name], value), name
    assert_close(whole["log"], first["log"] + second["log"])


def test_virtual_stages_go_on_in_one_rank(model_dirs: dict[str, str], tmp_path: Path) -> None:
    path, directory = model_dirs["llama-deep-tied"], tmp_path / "step"
    directory.mkdir()
    [whole] = world(1).run(ranks.train, path, [0, 1, 3, 5])
    virtual = PP2 | {"virtual_pipeline_parallel_size": 2}
    first = world(2).run(ranks.train, path, [0, 1], None, {1: str(directory)}, parallel=virtual)[0]
    [second] = world(1).run(ranks.train, path, [3, 5], str(directory))
    for name, value in first["weights"].items():
        assert np.array_equal(second["started_with"][name], value), name
    assert_close(whole["log"], first["log"] + second["log"])


@pytest.mark.parametrize("distributed", [False, True])
def test_data_parallel_ranks_go_on(model_dirs: dict[str, str], distributed: bool, tmp_path: Path) -> None:
    """The distributed optimizer's state lies on both."""
    model, directory = model_dirs["llama-biases"], tmp_path / "step"
    directory.mkdir()
    whole = world(2).run(ranks.train, model, [0, 1, 2, 3], None, {1: str(directory)}, distributed)[0]
    resumed = world(2).run(ranks.train, model, [2, 3], str(directory), None, distributed)[0]
    assert resumed["log"] == whole["log"][2:]


def test_an_incomplete_directory_is_refused(model_dirs: dict[str, str], tmp_path: Path) -> None:
    [message] = world(1).run(ranks.load_error, model_dirs["qwen3-tied"], str(tmp_path))
    assert message == f"checkpoint {tmp_path} has no metadata.json: it is not a complete checkpoint"
