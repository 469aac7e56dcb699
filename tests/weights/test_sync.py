"""The order of a weight sync between real ranks: what must finish before an engine reads or wakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_model
from tests.trainer.world import world
from tests.weights import sync_ranks


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    save_model("qwen3-tied", folder)
    return str(folder)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "lora"])
def test_weights_are_complete_on_every_device_before_any_rank_says_so(
    model_dir: str, lora: dict[str, Any] | None
) -> None:
    first, second = world(2).run(sync_ranks.publish_beside_a_slow_device, model_dir, lora)
    assert len(second["done"]) == 2, "once for each way of offering"
    for told, done in zip(first["told"], second["done"], strict=True):
        assert told >= done, "rank 0 has the engine: it must not be ahead of rank 1's device"


def test_the_engine_takes_memory_when_the_last_rank_has_given_its_own() -> None:
    parts = ["gradients", "optimizer", "kv_cache"]
    ranks = world(2).run(sync_ranks.give_memory, "engine", parts)
    assert ranks[0]["engine took"] >= max(rank["trainer gave"] for rank in ranks)
    ranks = world(2).run(sync_ranks.give_memory, "trainer", parts)
    assert min(rank["trainer took"] for rank in ranks) >= ranks[0]["engine gave"]


def test_checksums_are_asked_by_the_handles_that_engines_got(model_dir: str) -> None:
    [facts] = world(1).run(sync_ranks.checksums_by_other_handles, model_dir)
    assert facts["found"] == facts["expected"]
    assert facts["shared"] == facts["storages"], "each storage once"
