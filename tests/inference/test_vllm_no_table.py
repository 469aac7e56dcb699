"""Families without a table in vLLM: its own loader takes the trainer's tensors and computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference.interface import GenerateRequest, SamplingConfig
from megarl.inference.vllm.engine import VllmEngine
from megarl.loops.engine_setup import attach_weights
from megarl.models import load_architecture
from megarl.models.any_family import has_engine_table
from megarl.records import token_ids
from megarl.weights.checksum import region_checksum
from megarl.weights.file_owner import FileOwner
from tests.inference.driving import generate
from tests.inference.mini_trainer import logprobs_of
from tests.trainer.torch import families

# Heads of 32, which vLLM's CPU attention takes.
SIZES: dict[str, Any] = {**families.SIZES, "hidden_size": 128, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}
SYNCS = 10
SAMPLING = SamplingConfig(temperature=1.0, stop_token_ids=(), logprobs=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both engines start at once: most of it is the import of vllm."""
    found = {}
    for name, options in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(name, **(SIZES | options))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.save_pretrained(folder)
        engine = VllmEngine.start(
            folder,
            EngineConfig(kv_cache_gib=0.05, num_threads=1),
            dtype="float32",
            max_model_len=128,
            seed=1,
            log_dir=folder / "logs",
        )
        found[name] = folder, model, engine
    yield found
    for _, _, engine in found.values():
        engine.shutdown()
    stop_ray()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_engine_logprobs_are_those_of_the_trainers_tensors(started: Any, name: str) -> None:
    folder, model, engine = started[name]
    architecture = load_architecture(folder, any_family=True)
    assert not has_engine_table(architecture)
    files = FileOwner(folder, "float32")
    lines = attach_weights(engine, architecture, [files.owner()])
    size = sum(tensor.nbytes for tensor in files._tensors.values())
    assert any("load_weights" in line and f"{size / 2**20:.1f} MiB" in line for line in lines), lines
    draw = torch.Generator().manual_seed(3)
    requests = [
        GenerateRequest(f"r{i}", token_ids(torch.randint(3, 250, (9 + i,), generator=draw)), 12, seed=i)
        for i in range(4)
    ]
    prompts = {request.request_id: request.prompt_ids for request in requests}
    seen = set()
    for sync in range(SYNCS):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.05 * torch.randn(param.shape, generator=draw))
            state = model.state_dict()
            for key, tensor in files._tensors.items():
                tensor.copy_(state[key])
        assert engine.sync(sync).bytes_moved == size
        [sums] = engine.checksums()
        assert {each.param for each in sums} == set(files._tensors)
        assert all(each.value == region_checksum(state[each.param]) for each in sums)
        if sync not in (0, SYNCS - 1):
            continue
        for response in generate(engine, requests, SAMPLING):
            expected = logprobs_of(model, prompts[response.request_id], response.token_ids)
            assert (expected - torch.tensor(response.logprobs)).abs().max() < 1e-4
            seen.add(tuple(response.token_ids.tolist()))
    assert len(seen) == 2 * len(requests), "other weights, other tokens"


@pytest.mark.slow
def test_a_model_that_vllm_lacks_is_named(tmp_path: Path) -> None:
    from megarl.inference.vllm.build import _register_architecture

    config = transformers.AutoConfig.for_model("phi3", **SIZES, architectures=["OwnForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path: vLLM has no OwnForCausalLM .*backend = hf"):
        _register_architecture(str(tmp_path))
