"""The torch backend against the Megatron backend on the same batches, on one rank and on several."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.torch import backend_ranks
from tests.trainer.world import world

MODELS = ("llama-biases", "llama-tied-biases-llama3", "qwen2-tied", "qwen3-tied", "qwen3-moe-mixed-tied")
TP2 = {"tensor_parallel_size": 2}
SP = TP2 | {"sequence_parallel": True}
# Ranks, and the sections parallel and trainer.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fsdp2": (2, {}, {}),
    "replicas2": (2, {}, {"replicate_size": 2}),
    "offloaded2": (2, {}, {"cpu_offload": True}),
    "reduced2": (2, {}, {"reduce_each_microbatch": True}),
    "reduced-hsdp2x2": (4, {}, {"reduce_each_microbatch": True, "replicate_size": 2}),
    "reduced-offloaded2": (2, {}, {"reduce_each_microbatch": True, "cpu_offload": True}),
    "tp2": (2, TP2, {}),
    "tp2-sp": (2, SP, {}),
    "fsdp4": (4, {"activation_recompute": "selective"}, {"reshard_after_forward": False}),
    "hsdp2x2": (4, {"activation_recompute": "full"}, {"replicate_size": 2}),
    "tp2-fsdp2": (4, TP2, {}),
    "tp2-sp-fsdp2": (4, SP | {"activation_recompute": "full"}, {}),
}
QUICK = {
    ("llama-biases", "fsdp2"),
    ("llama-biases", "reduced2"),
    ("qwen3-moe-mixed-tied", "tp2-sp"),
    ("qwen3-tied", "tp2-fsdp2"),
}
ROWS = [
    pytest.param(model, name, marks=[] if (model, name) in QUICK else pytest.mark.slow)
    for model in MODELS
    for name in LAYOUTS
]


@pytest.fixture(scope="session")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models.tiny import save_model

    folder: Path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_model(name, folder / name)
    return {name: str(folder / name) for name in MODELS}


@functools.cache
def megatron(model_dir: str) -> dict[str, Any]:
    [found] = world(1).run(backend_ranks.steps, model_dir, "megatron")
    return dict(found)


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_equals_the_megatron_backend(dirs: dict[str, str], model: str) -> None:
    [found] = world(1).run(backend_ranks.steps, dirs[model])
    backend_ranks.assert_equal_steps(found, megatron(dirs[model]))


@pytest.mark.parametrize(("model", "name"), ROWS)
def test_layouts_equal_the_megatron_backend(dirs: dict[str, str], model: str, name: str) -> None:
    size, parallel, trainer = LAYOUTS[name]
    results = world(size).run(
        backend_ranks.steps, dirs[model], "torch", trainer, parallel=parallel | {"num_processes": size}
    )
    assert all(found == results[0] for found in results), "every rank reports the same"
    backend_ranks.assert_equal_steps(results[0], megatron(dirs[model]))


@pytest.mark.parametrize(
    ("backend", "size", "model"),
    [
        ("megatron", 1, "llama-biases"),
        ("megatron", 1, "qwen3-moe-mixed-tied"),
        ("torch", 1, "qwen3-moe-mixed-tied"),
        ("torch", 2, "llama-biases"),
    ],
)
def test_a_dropped_trainer_frees_its_model(dirs: dict[str, str], backend: str, size: int, model: str) -> None:
    assert all(world(size).run(backend_ranks.is_freed, dirs[model], backend))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_host_memory_changes_no_bit(dirs: dict[str, str], size: int) -> None:
    """Parameters and optimizer on the host: the same steps as in the device's memory."""
    run = functools.partial(world(size).run, backend_ranks.steps, dirs["llama-biases"], "torch")
    there = run({"cpu_offload": True}, parallel={"num_processes": size})
    assert there == run({}, parallel={"num_processes": size})


def test_adapters_equal_the_megatron_backend(dirs: dict[str, str]) -> None:
    """Metrics, merged weights and the adapters themselves, on one rank and sharded over two."""
    [ours] = world(1).run(backend_ranks.adapted, dirs["qwen3-tied"], "torch")
    [theirs] = world(1).run(backend_ranks.adapted, dirs["qwen3-tied"], "megatron")
    sharded, shared = (
        world(2).run(backend_ranks.adapted, dirs["qwen3-tied"], "torch", parallel=parallel)[0]
        for parallel in ({"num_processes": 2}, SP | {"num_processes": 2})
    )
    for found in (ours, sharded, shared):
        backend_ranks.assert_equal_steps(found["steps"], theirs["steps"])
        for kind in ("merged", "adapters"):
            assert found[kind].keys() == theirs[kind].keys()
            for name, value in theirs[kind].items():
                assert abs(found[kind][name] - value).max() < 1e-5, (kind, name)


def test_a_critic_equals_the_megatron_backends(dirs: dict[str, str]) -> None:
    [ours] = world(1).run(backend_ranks.critic, dirs["llama-biases"], "torch")
    [theirs] = world(1).run(backend_ranks.critic, dirs["llama-biases"], "megatron")
    halves = world(2).run(
        backend_ranks.critic, dirs["llama-biases"], "torch", parallel=SP | {"num_processes": 2}
    )
    for found in (ours, *halves):
        for number, expected in enumerate(theirs):
            assert found[number] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_parameters_on_the_host_train_the_same(dirs: dict[str, str], offload: bool) -> None:
    """FSDP keeps them there, and gradients and moments with them, on a single rank too."""
    trainer = {"cpu_offload": offload}
    [policies] = world(1).run(backend_ranks.offload_policies, dirs["qwen3-tied"], trainer)
    assert policies == ({"CPUOffloadPolicy"} if offload else set())
    [found] = world(1).run(backend_ranks.steps, dirs["qwen3-tied"], "torch", trainer)
    backend_ranks.assert_equal_steps(found, megatron(dirs["qwen3-tied"]))
