"""Checkpoints: a new process continues exactly, under any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Two steps after the resume, so moments, step count, schedule and random state all matter."""
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


@dataclass(frozen=True)
class Move:
    """A run that is saved after two steps under one layout and continues for two under another."""

    model: str
    ranks: tuple[int, int]
    before: dict[str, Any]
    after: dict[str, Any]
    distributed: bool = False


EP2 = {"expert_parallel_size": 2}
MOVES = {
    "dp2-distributed to tp2": Move("llama-biases", (2, 2), {}, TP2, True),
    "tp2 to dp2-distributed": Move("qwen3-tied", (2, 2), TP2, {}, True),
    "pp2 to cp2": Move("qwen3-tied", (2, 2), PP2, {"context_parallel_size": 2}),
    "ep2 to one": Move("qwen3-moe-mixed-tied", (2, 1), EP2, {}),
    "ep2-distributed to one": Move("qwen3-moe-mixed-tied", (2, 1), EP2, {}, True),
    "one to ep2": Move("qwen3-moe-mixed-tied", (1, 2), {}, EP2),
    "tp2-pp2 to one": Move("llama-deep-tied", (4, 1), TP2 | PP2, {}),
    "dp2-tp2-distributed to one": Move("llama-biases", (4, 1), TP2, {}, True),
    "one to tp2-pp2": Move("llama-deep-tied", (1, 4), {}, TP2 | PP2),
    "pp2-ep2-distributed to one": Move("qwen3-moe-mixed-tied", (4, 1), PP2 | EP2, {}, True),
    "pp2-ep2 to one": Move("qwen3-moe-mixed-tied", (4, 1), PP2 | EP2, {}),
    "one to pp2-ep2-distributed": Move("qwen3-moe-mixed-tied", (1, 4), {}, PP2 | EP2, True),
    "dp2-ep2-distributed to one": Move("qwen3-moe-mixed-tied", (4, 1), EP2, {}, True),
}


QUICK = ("dp2-distributed to tp2", "ep2 to one", "ep2-distributed to one", "tp2-pp2 to one")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MOVES],
)
def test_another_layout_goes_on_as_the_uninterrupted_run(
    model_dirs: dict[str, str], name: str, tmp_path: Path
) -> None:
    """Next losses, optimizer state included, are those of one rank that was never stopped."""
    move, directory = MOVES[name], tmp_path / "step"
    path = model_dirs[move.model]
    directory.mkdir()
    [whole] = world(1).run(ranks.train, path, [0, 1, 3, 5])
    arguments = (path, [0, 1], None, {1: str(directory)}, move.distributed)
    first = world(move.ranks[0]).run(ranks.train, *arguments, parallel=move.before)[0]
    arguments = (path, [3, 5], str(directory), None, move.distributed)
    second = world(move.ranks[1]).run(ranks.train, *arguments, parallel=move.after)[0]
    assert first["weights"].keys() == second["started_with"].keys()
    for tensor, value in first["weights"].items():
        assert np.array_equal(second["started_with"][tensor], value), tensor
    assert_close(whole["log"], first["log"] + second["log"])
    for tensor, value in whole["weights"].items():
        assert np.abs(second["weights"][tensor] - value).max() < 2e-5, tensor


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


def test_several_buckets_go_on(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """Large models have them where gradients are reduced as they come; padding between them is nobody's."""
    model, parallel, directory = model_dirs["llama-biases"], {"overlap_grad_reduce": True}, tmp_path / "step"
    directory.mkdir()
    arguments: tuple[Any, ...] = (model, [0, 1, 2, 3], None, {1: str(directory)})
    whole = world(2).run(ranks.train_in_buckets, *arguments, parallel=parallel)[0]
    resumed = world(2).run(ranks.train_in_buckets, model, [2, 3], str(directory), None, parallel=parallel)[0]
    assert resumed["log"] == whole["log"][2:]
    [alone] = world(1).run(ranks.train, model, [3], str(directory), None, True)
    for name, value in resumed["started_with"].items():
        assert np.array_equal(alone["started_with"][name], value), name


@pytest.mark.parametrize(
    ("name", "size", "parallel", "distributed"),
    [("qwen3-moe-mixed-tied", 2, EP2, True), ("llama-biases", 2, TP2, False)],
)
def test_files_are_those_that_megatron_writes(
    model_dirs: dict[str, str],
    name: str,
    size: int,
    parallel: dict[str, Any],
    distributed: bool,
    tmp_path: Path,
) -> None:
    """Tensor by tensor; and what Megatron wrote itself goes on, as runs of older versions have it."""
    for folder in ("ours", "megatrons"):
        (tmp_path / folder).mkdir()
    arguments = (model_dirs[name], str(tmp_path / "ours"), str(tmp_path / "megatrons"), distributed)
    for ours, megatrons in world(size).run(ranks.save_twice, *arguments, parallel=parallel):
        assert ours.keys() == megatrons.keys() and len(ours) > 20
        for tensor, value in megatrons.items():
            assert np.array_equal(ours[tensor], value), tensor
    logs = []
    for folder in ("ours", "megatrons"):
        arguments = (model_dirs[name], [2, 3], str(tmp_path / folder), None, distributed)
        logs.append(world(size).run(ranks.train, *arguments, parallel=parallel)[0]["log"])
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("size", "distributed", "dtype"),
    [(1, False, "bfloat16"), (2, True, "float32"), (2, False, "float32")],
)
def test_a_background_save_is_of_the_step_it_was_asked_at(
    model_dirs: dict[str, str], size: int, distributed: bool, dtype: str, tmp_path: Path
) -> None:
    """Training goes on for two steps before a byte is written."""
    path, directory = model_dirs["qwen3-tied"], tmp_path / "step"
    directory.mkdir()
    whole = world(size).run(ranks.train_while_saving, path, str(directory), distributed, dtype)[0]
    assert not whole["done_before"]
    assert whole["done"]
    arguments = (path, [3, 5], str(directory), None, distributed, dtype)
    resumed = world(size).run(ranks.train, *arguments)[0]
    assert resumed["log"] == whole["log"]
    for name, value in whole["weights"].items():
        assert np.array_equal(resumed["weights"][name], value), name


def test_a_background_save_that_cannot_write_is_an_error(model_dirs: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "step"
    directory.mkdir()
    (directory / "__0_0.distcp").mkdir()  # in the place of the file
    [message] = world(1).run(ranks.unwritable, model_dirs["qwen3-tied"], str(directory))
    assert message.startswith(f"checkpoint {directory}: rank 0 could not write it: ")
    assert "Is a directory" in message


def test_a_gpus_generator_goes_on_on_gpus_alone() -> None:
    [facts] = world(1).run(ranks.random_states)
    assert facts == {
        "cpu to gpu": (False, [6, 7]),
        "gpu to gpu": (True, [1, 2]),
        "gpu to cpu": (False, True),
        "cpu to cpu": (True, True),
    }


def test_an_incomplete_directory_is_refused(model_dirs: dict[str, str], tmp_path: Path) -> None:
    [message] = world(1).run(ranks.load_error, model_dirs["qwen3-tied"], str(tmp_path))
    assert message == f"checkpoint {tmp_path} has no metadata.json: it is not a complete checkpoint"
