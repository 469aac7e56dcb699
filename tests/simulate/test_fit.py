"""A GPU too small for a run is rejected in one line, from the model's size alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.config.grpo import GrpoConfig
from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.loops import model_files as models
from megarl.models import load_architecture
from megarl.simulate.fit import least_memory, too_small

GIB = 2**30
PATH = "configs/models/qwen3_8b"
NUM_PARAMETERS = 8_190_735_360  # Qwen3-8B's, as its model card counts them


def config(**options: Any) -> Any:
    fields: dict[str, Any] = {
        "run": {"dir": "r"},
        "model": {"path": PATH, "dtype": "bfloat16"},
        "data": {"train": {"source": "reasoning_gym", "task": "chain_sum", "size": 8}},
        "optimizer": {"lr": 1e-6},
        "rollout": {
            "num_prompts_per_step": 8,
            "num_generations_per_prompt": 8,
            "max_new_tokens": 64,
            "engine": {"kv_cache_gib": 3.0},
        },
        "training": {"num_steps": 1},
    }
    return GrpoConfig.model_validate(fields | options)


def needed(ranks: int = 1, rank: int = 0, **options: Any) -> int:
    layout = ParallelLayout(data=ranks)
    memory = least_memory(config(**options), load_architecture(PATH), layout, layout.coordinates(rank), rank)
    return memory.total


def test_a_parameter_takes_eighteen_bytes_and_the_engine_its_cache() -> None:
    """bfloat16 weights 2, float32 gradients 4, master copy 4, two moments 8."""
    assert needed() == 18 * NUM_PARAMETERS + 3 * GIB
    sharded = {"optimizer": {"lr": 1e-6, "distributed": True}}
    assert needed(4, 0, **sharded) == (6 + 12 // 4) * NUM_PARAMETERS + 3 * GIB
    assert needed(4, 1, **sharded) == (6 + 12 // 4) * NUM_PARAMETERS, "the engine is on rank 0's GPU"
    float32 = {"model": {"path": PATH, "dtype": "float32"}}
    assert needed(**float32) == 16 * NUM_PARAMETERS + 3 * GIB


def test_what_takes_turns_is_counted_once() -> None:
    layout = ParallelLayout()
    memory = least_memory(config(), load_architecture(PATH), layout, layout.coordinates(0), 0)
    trainer = 18 * NUM_PARAMETERS
    for offload, most in (
        ([], trainer + 3 * GIB),
        (["kv_cache"], trainer + 3 * GIB),  # it is there while the trainer's parts still are
        (["kv_cache", "optimizer"], trainer),
    ):
        assert too_small(memory, offload, most, "GPU 0") is None
        assert too_small(memory, offload, most - 1, "GPU 0") is not None


def test_a_small_card_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ParallelLayout()
    on_gpu: Any = SimpleNamespace(
        platform=SimpleNamespace(device=torch.device("cuda", 2)),
        layout=layout,
        at=layout.coordinates(0),
        rank=0,
    )
    monkeypatch.setattr(models, "gather", lambda value: [None, value, value])
    monkeypatch.setattr(models, "from_first_rank", lambda make: make())
    monkeypatch.setattr(models, "free_bytes", lambda _: 79 * GIB)
    with pytest.raises(UserError) as caught:
        models.check_fits(config(), load_architecture(PATH), on_gpu)
    assert str(caught.value) == (
        "parallel: rank 0's GPU 2 has 79.00 GiB free, and this run needs 140.31 there before activations "
        "(parameters 15.26, gradients 30.51, optimizer 91.54, kv cache 3.00); split it over more ranks, or "
        "use optimizer.distributed or lora"
    )
    monkeypatch.setattr(models, "free_bytes", lambda _: 141 * GIB)
    models.check_fits(config(), load_architecture(PATH), on_gpu)
