"""Checkpoints of the torch backend: written by one layout, read by another; exact where the layout stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.torch import backend_ranks
from tests.trainer.world import world

MODEL = "qwen3-moe-mixed-tied"
TP2 = {"tensor_parallel_size": 2}
Layout = tuple[int, dict[str, Any], dict[str, Any]]
FSDP2: Layout = (2, {}, {})
READERS: dict[str, Layout] = {
    "fsdp2": FSDP2,
    "one": (1, {}, {}),
    "tp2": (2, TP2, {}),
    "replicas2": (2, {}, {"replicate_size": 2}),
    "offloaded": (2, {}, {"cpu_offload": True}),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.models.tiny import save_model

    folder: Path = tmp_path_factory.mktemp("model")
    save_model(MODEL, folder)
    return str(folder)


def run(layout: Layout, function: Any, *args: Any) -> list[Any]:
    size, parallel, trainer = layout
    return world(size).run(function, *args, trainer, parallel=parallel | {"num_processes": size})


def test_a_checkpoint_is_read_under_any_layout(model_dir: str, tmp_path: Path) -> None:
    written, _ = run(FSDP2, backend_ranks.save, model_dir, str(tmp_path))
    for name, layout in READERS.items():
        read = run(layout, backend_ranks.go_on, model_dir, str(tmp_path))[0]
        assert read["weights"].keys() == written["weights"].keys()
        for key, value in written["weights"].items():
            assert np.array_equal(read["weights"][key], value), (name, key)
        if name == "fsdp2":
            assert read["random_states"] and read["third"] == written["third"], "the same bits"
        else:
            for key in ("loss", "grad_norm"):
                assert read["third"][key] == pytest.approx(written["third"][key], rel=1e-5), name
    [error] = world(1).run(backend_ranks.load_error, model_dir, "megatron", str(tmp_path))
    assert "trainer.backend = torch wrote it" in error


@pytest.mark.parametrize("size", [1, 2])
def test_a_reference_pass_leaves_the_weights_where_and_as_they_are(model_dir: str, size: int) -> None:
    for found in world(size).run(backend_ranks.exchange, model_dir, parallel={"num_processes": size}):
        assert all(found.values()), found
