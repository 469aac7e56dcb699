"""Configurations rejected before an engine starts."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ray
import torch

from megarl import platform
from megarl.config.model import ModelConfig
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.actor import engine as actor_engine
from megarl.inference.actor import process as actor_process
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
