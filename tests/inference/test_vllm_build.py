"""Settings of an engine on a GPU, against vLLM's own checks, kernels and memory pools."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.vllm import build
from megarl.inference.vllm.build import engine_arguments

GIB = 2**30


def settings(model_dir: str = "model", **options: Any) -> EngineSettings:
    return EngineSettings(model_dir, EngineConfig(kv_cache_gib=2.0), "bfloat16", 512, 1, "tmp", **options)


def arguments(*, on_gpu: bool, **options: Any) -> dict[str, Any]:
    return engine_arguments(settings(**options), transformers.Qwen3MoeConfig(), on_gpu)


def test_a_card_that_the_trainer_has_filled_is_not_refused() -> None:
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    asked = arguments(on_gpu=True)
    cache = CacheConfig(
        **({"gpu_memory_utilization": share} if (share := asked.get("gpu_memory_utilization")) else {})
    )
    card: Any = SimpleNamespace(total_memory=80 * GIB, free_memory=3 * GIB, device_="cuda:0")
    assert request_memory(card, cache) < GIB
    assert asked["kv_cache_memory_bytes"] == 2 * GIB, "which is what the cache then gets"


def test_vllm_knows_every_argument(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for on_gpu in (False, True):
        options = {"model_dir": str(tmp_path), "record_routing": True, "offload_kv_cache": True}
        EngineArgs(**arguments(on_gpu=on_gpu, **options))


def test_the_card_is_compared_with_the_cache_in_one_line() -> None:
    from megarl.inference.vllm.gpu_worker import check_cache_fits

    check_cache_fits(2 * GIB, 2 * GIB, 80 * GIB, 0)
    with pytest.raises(UserError) as caught:
        check_cache_fits(2 * GIB, 2 * GIB - 1, 80 * GIB, 3)
    assert str(caught.value) == (
        "rollout.engine.kv_cache_gib: 2.00 GiB do not fit GPU 3: 2.00 of 80.0 GiB are free beside the "
        "trainer and the engine's weights"
    )


def test_a_users_error_comes_out_of_a_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    told = "rollout.engine.kv_cache_gib: 2.00 GiB do not fit GPU 3: it isn't free"

    def fails(_: Any) -> Any:
        raise RuntimeError(
            f"Worker failed with error '{told}', please check the stack trace above for the root cause"
        )

    monkeypatch.setattr(LLMEngine, "from_engine_args", fails)
    monkeypatch.setattr(build, "_register_architecture", lambda _: transformers.Qwen3MoeConfig())
    with pytest.raises(UserError) as caught:
        build.build_engine(settings(str(tmp_path)))
    assert str(caught.value) == told


def test_experts_stay_as_they_are_stored() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
        UnquantizedMoeBackend,
        convert_to_unquantized_kernel_format,
        map_unquantized_backend,
    )
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    from megarl.inference.vllm.layout import foreign_layouts

    chosen = map_unquantized_backend(arguments(on_gpu=True)["moe_backend"])
    experts: Any = SimpleNamespace(is_act_and_mul=True, activation=MoEActivation.SILU)
    w13, w2 = torch.randn(2, 8, 4), torch.randn(2, 4, 4)
    changes = {}
    for backend in (
        chosen,
        UnquantizedMoeBackend.BATCHED_TRITON,
        UnquantizedMoeBackend.FLASHINFER_CUTLASS,
    ):
        new = convert_to_unquantized_kernel_format(backend, experts, w13.clone(), w2.clone())
        changes[backend] = not (torch.equal(new[0], w13) and torch.equal(new[1], w2))
        method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
        torch.nn.Module.__init__(method)
        method.unquantized_backend = backend
        layer, model = torch.nn.Module(), torch.nn.Module()
        layer.quant_method = method
        model.mlp = layer
        assert bool(foreign_layouts(model)) == changes[backend], backend
    assert not changes[chosen]
    assert changes[UnquantizedMoeBackend.FLASHINFER_CUTLASS], "the reason for all this"


def test_quantized_weights_are_refused() -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

    from megarl.inference.vllm.layout import foreign_layouts

    model = torch.nn.Module()
    for name in ("one", "two"):
        layer = torch.nn.Module()
        layer.quant_method = Fp8LinearMethod.__new__(Fp8LinearMethod)
        model.add_module(name, layer)
    assert foreign_layouts(model) == ["one: its weights are quantized (Fp8LinearMethod)"], "each kind once"


def test_weights_are_not_in_the_pool_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    from megarl.inference.vllm.gpu_worker import GpuWorker

    asked = []
    monkeypatch.setattr(
        Worker, "_maybe_get_memory_pool_context", lambda _, tag: (asked.append(tag), nullcontext())[1]
    )
    worker = GpuWorker.__new__(GpuWorker)
    for tag in ("weights", "kv_cache", "runtime", "workspace"):
        with worker._maybe_get_memory_pool_context(tag):
            pass
    assert asked == ["kv_cache", "runtime", "workspace"]


def test_experts_are_returned_by_vllm_on_a_gpu_and_recorded_on_a_cpu() -> None:
    from megarl.inference.vllm.routing import returned_routing

    assert arguments(on_gpu=True, record_routing=True)["enable_return_routed_experts"]
    assert not arguments(on_gpu=False, record_routing=True).get("enable_return_routed_experts")
    every_layer = np.arange(2 * 4 * 3, dtype=np.uint16).reshape(2, 4, 3)
    kept = returned_routing(every_layer, [1, 3])
    assert kept.dtype == np.int16
    assert kept.tolist() == [[[3, 4, 5], [9, 10, 11]], [[15, 16, 17], [21, 22, 23]]]


def test_logprobs_of_the_sampled_tokens_are_the_first_of_each_position() -> None:
    from vllm.logprobs import FlatLogprobs, Logprob

    from megarl.inference.vllm.worker import sampled_logprobs

    flat = FlatLogprobs()
    for position, value in enumerate((-0.1, -2.5, -7.0)):
        flat.append({5 + position: Logprob(value, rank=1), 99: Logprob(-9.0, rank=2)})
    found = sampled_logprobs(flat)
    assert found.dtype == np.float32
    assert found.tolist() == np.float32([-0.1, -2.5, -7.0]).tolist()


def test_vllm_does_not_expect_quantised_weights(tmp_path: Path) -> None:
    """The trainer's are dequantised; config.json still speaks of FP8."""
    from vllm.engine.arg_utils import EngineArgs

    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        architectures=["Qwen3ForCausalLM"],
        quantization_config=fp8,
    )
    config.save_pretrained(tmp_path)
    asked = engine_arguments(settings(str(tmp_path)), config, False)
    assert EngineArgs(**asked).create_model_config().quantization is None
    assert EngineArgs(**asked | {"hf_overrides": {}}).create_model_config().quantization == "fp8"
