"""Engines of a trainer with adapters: real Megatron on gloo, real vLLM, and transformers on exports."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megarl.cluster.ray_runtime import stop_ray
from megarl.loops.engine_setup import attach_weights
from megarl.models import load_architecture
from tests.trainer import lora_ranks, ranks
from tests.trainer.world import world
from tests.weights.test_engine_matrix import TOLERANCE, Bench
from tests.weights.test_engine_sync import worst_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LORA = {"rank": 4, "alpha": 64.0, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
EXPERTS = LORA | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SP = {"tensor_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(*request.param, tmp_path)
    yield bench
    bench.engine.shutdown()
    stop_ray()


@pytest.mark.parametrize(
    ("bench", "lora", "parallel", "transport", "moves"),
    [
        (("llama", 1), LORA, {"pipeline_parallel_size": 2}, "auto", False),
        (("llama", 1), LORA, SP, "auto", True),  # the engine has whole what tensor ranks share
        (("qwen3_moe", 1), EXPERTS, {"expert_parallel_size": 2}, "peer", True),
    ],
    indirect=["bench"],
    ids=["llama-pp2", "llama-tp2-sp", "qwen3_moe-ep2-peer"],
)
def test_every_weight_sync_is_the_merged_policy(
    bench: Bench, lora: dict[str, Any], parallel: dict[str, Any], transport: Any, moves: bool
) -> None:
    place, sizes = bench.directory / "messages", parallel | {"num_processes": 2}
    place.mkdir()
    arguments = (str(bench.model_dir), lora, str(place), 2, transport)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(world(2).run, lora_ranks.train_and_wait, *arguments, parallel=sizes)
        attach_weights(
            bench.engine, load_architecture(bench.model_dir), ranks.take(place / "owners"), transport
        )
        bench.engine.sync(0)
        assert worst_difference(bench, bench.model_dir) < TOLERANCE, "B is 0"
        ranks.put(place / "attached", None)
        for step in (1, 2):
            ranks.take(place / f"trained-{step}")
            assert (bench.engine.sync(step).bytes_moved > 0) == moves
            assert worst_difference(bench, place / f"export-{step}") < TOLERANCE
            # What it had before is far from that.
            before = place / "export-1" if step == 2 else bench.model_dir
            assert worst_difference(bench, before) > 100 * TOLERANCE
            ranks.put(place / f"checksums-{step}", bench.checksums())
            assert [ranks.take(place / f"wrong-{step}-{rank}") for rank in range(2)] == [[], []]
        done.result()
