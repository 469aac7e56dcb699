"""Configurations rejected before an engine starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch
import transformers

from megarl import platform
from megarl.config.model import ModelConfig
from megarl.config.online import WeightsConfig
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.actor import engine as actor_engine
from megarl.inference.actor import process as actor_process
from megarl.inference.actor.settings import EngineSettings
from megarl.inference.vllm.build import engine_arguments
from megarl.inference.vllm.engine import VllmEngine
from megarl.loops.engine_setup import check_batch_invariance, rounding_note, start_engine
from megarl.models import load_architecture


def test_latent_attention_has_no_engine_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    model = ModelConfig(path="configs/models/deepseek_v3_671b")
    with pytest.raises(UserError, match=r"model\.path: .* has latent attention"):
        start_engine(
            model, load_architecture(model.path), EngineConfig(), max_model_len=64, seed=1, log_dir=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_batch_invariance_needs_a_gpu_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "chosen_name", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    model, engine = ModelConfig(path="configs/models/qwen3_8b"), EngineConfig(batch_invariant=True)
    architecture = load_architecture(model.path)
    with pytest.raises(UserError, match=r"rollout\.engine\.batch_invariant: needs GPUs .* \(here: 8\.0\)"):
        start_engine(model, architecture, engine, max_model_len=64, seed=1, log_dir=tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_batch_invariance(engine)


@pytest.mark.parametrize("invariant", [False, True])
def test_seeds_alone_fix_no_tokens_on_a_gpu_and_the_log_says_so(
    invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []
    actor = MagicMock()
    monkeypatch.setattr(ray, "remote", lambda _: actor)
    monkeypatch.setattr(actor_engine, "start_ray", lambda: None)
    monkeypatch.setattr(actor_engine, "ray_temp_dir", lambda: tmp_path)
    monkeypatch.setattr(
        actor_process, "beside_ranks", lambda _node, _devices, variables: (asked.append(variables), {})[1]
    )
    engine = EngineConfig(batch_invariant=invariant, data_parallel_size=2)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(platform, "chosen_name", lambda device=device: device)
        VllmEngine.start(tmp_path, engine, dtype="bfloat16", max_model_len=64, seed=1)
        assert bool(rounding_note(engine)) == (device == "cuda" and not invariant)
    on_gpu, on_cpu = (variables.get("VLLM_BATCH_INVARIANT") for variables in asked)
    assert on_gpu == ("1" if invariant else None) and on_cpu is None
    assert not rounding_note(EngineConfig()), "one engine"


def test_router_replay_on_a_gpu_needs_the_prefix_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own way of returning experts does; the one on a CPU does not."""
    monkeypatch.setattr(platform, "chosen_name", lambda: "cuda")
    model, engine = (
        ModelConfig(path="configs/models/qwen3_30b_a3b"),
        EngineConfig(enable_prefix_caching=False),
    )
    options = {"max_model_len": 64, "seed": 1, "log_dir": tmp_path, "record_routing": True}
    with pytest.raises(UserError, match=r"rollout\.router_replay: needs rollout\.engine\.enable_prefix"):
        start_engine(model, load_architecture(model.path), engine, **options)


def started_with(
    engine: EngineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: WeightsConfig | None = None,
) -> EngineSettings:
    """What an engine's process is given when an engine of these settings is started."""
    actor = MagicMock()
    monkeypatch.setattr(platform, "chosen_name", lambda: "cpu")
    monkeypatch.setattr(ray, "remote", lambda _: actor)
    monkeypatch.setattr(actor_engine, "start_ray", lambda: None)
    monkeypatch.setattr(actor_engine, "ray_temp_dir", lambda: tmp_path)
    monkeypatch.setattr(actor_process, "beside_ranks", lambda *_: {})
    model = ModelConfig(path="configs/models/qwen3_8b", dtype="bfloat16")
    architecture = load_architecture(model.path)
    start_engine(model, architecture, engine, weights, max_model_len=64, seed=1, log_dir=tmp_path)
    settings: EngineSettings = actor.options.return_value.remote.call_args.args[0]
    return settings


def test_vllm_gets_the_settings_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments(*, on_gpu: bool = False, weights: WeightsConfig | None = None, **engine: Any) -> Any:
        settings = started_with(EngineConfig(**engine), tmp_path, monkeypatch, weights)
        return engine_arguments(settings, transformers.Qwen3Config(), on_gpu)

    assert arguments()["dtype"] == "bfloat16", "the trainer's"
    assert arguments(dtype="float32")["dtype"] == "float32"
    assert arguments()["kv_cache_memory_bytes"] == 2**29
    assert arguments(kv_cache_gib=1.5)["kv_cache_memory_bytes"] == 3 * 2**29
    assert arguments()["max_num_batched_tokens"] == 4096
    assert arguments(max_num_batched_tokens=300)["max_num_batched_tokens"] == 300
    assert arguments(max_num_batched_tokens=16, max_num_seqs=8)["max_num_batched_tokens"] == 64, "a sequence"
    for offload in (["kv_cache"], []):
        weights = WeightsConfig(offload=offload)
        assert arguments(on_gpu=True, weights=weights)["enable_sleep_mode"] == bool(offload)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_the_cache_of_older_weights_is_kept_where_that_is_asked_for(
    backend: Any, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megarl.inference.hf.worker import HfEngineActor
    from megarl.inference.vllm.worker import VllmEngineActor

    weights = WeightsConfig(keep_kv_cache=keep)
    settings = started_with(EngineConfig(backend=backend), tmp_path, monkeypatch, weights)
    forgot: list[str] = []
    actor: Any = (VllmEngineActor if backend == "vllm" else HfEngineActor).__new__(
        VllmEngineActor if backend == "vllm" else HfEngineActor
    )
    actor._settings, actor._device = settings, torch.device("cpu")
    actor._attached = SimpleNamespace(copy_=lambda: 7)
    actor._scheduler = SimpleNamespace(forget=lambda: forgot.append("hf"))
    actor._engine = SimpleNamespace(
        collective_rpc=lambda name: [7],
        reset_prefix_cache=lambda reset_running_requests: forgot.append("vllm"),
        set_weight_version=lambda version: None,
    )
    monkeypatch.setattr("megarl.inference.hf.worker.memory.wait_for", lambda device: None)
    assert actor._sync(3) == 7
    assert forgot == ([] if keep else [backend])
