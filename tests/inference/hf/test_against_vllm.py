"""Both engines with one owner's weights: the Hugging Face engine is what vLLM's is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.engine_group import start_engines
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.inference.placement import BESIDE_DRIVER
from megarl.loops.engine_setup import attach_weights
from megarl.models import load_architecture
from megarl.models.table import Region
from megarl.weights.shared_storage import share_parameters
from tests.inference.driving import generate
from tests.inference.hf.models import make_requests
from tests.inference.hf.test_sampler import kept_probabilities

TOLERANCE = 1e-4
GREEDY = SamplingConfig(temperature=0.0, stop_token_ids=(), logprobs=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One of each, and two of Hugging Face's behind one, with the weights of one model of transformers."""
    directory = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=250,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    params = dict(model.named_parameters())
    regions = [Region(n, box, n, box) for n, p in params.items() for box in [tuple((0, s) for s in p.shape)]]
    owner = share_parameters(params, regions)
    started, lines = {}, {}
    for name, backend, count in (("vllm", "vllm", 1), ("hf", "hf", 1), ("two", "hf", 2)):
        engine = EngineConfig.model_validate(
            {"backend": backend, "kv_cache_gib": 0.05, "num_threads": 1, "data_parallel_size": count}
        )
        options = {"dtype": "float32", "max_model_len": 256, "seed": 1, "log_dir": directory / name}
        started[name] = start_engines(Path(directory), engine, [BESIDE_DRIVER] * count, **options)
    for name, one in started.items():
        lines[name] = attach_weights(one, load_architecture(directory), [owner])
        one.sync(0)
    yield {**started, "lines": lines, "model": model.eval()}
    for one in started.values():
        one.shutdown()
    stop_ray()


def make_run() -> list[GenerateRequest]:
    return [replace(request, max_new_tokens=60) for request in make_requests(16, prompts=8)]


def run(engine: Any, sampling: SamplingConfig) -> dict[str, GeneratedResponse]:
    return {response.request_id: response for response in generate(engine, make_run(), sampling)}


def test_greedy_tokens_are_the_same_and_so_are_their_logprobs(engines: dict[str, Any]) -> None:
    theirs, ours = run(engines["vllm"], GREEDY), run(engines["hf"], GREEDY)
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for name, one in ours.items():
        assert one.token_ids.tolist() == theirs[name].token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, theirs[name].logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 12}, {"top_k": 40, "top_p": 0.8}])
def test_sampled_logprobs_mean_the_same(engines: dict[str, Any], options: dict[str, Any]) -> None:
    """Each engine's, of the tokens it drew, against the definition in float64."""
    sampling = replace(GREEDY, **{"temperature": 1.0, **options})
    for name in ("vllm", "hf"):
        responses = run(engines[name], sampling)
        for request in make_run():
            response = responses[request.request_id]
            ids = torch.tensor([[*request.prompt_ids, *response.token_ids]])
            with torch.no_grad():
                logits = engines["model"](ids).logits[0, len(request.prompt_ids) - 1 : -1].numpy()
            kept = [
                kept_probabilities(row, sampling.temperature, sampling.top_k, sampling.top_p)
                for row in logits
            ]
            expected = np.log([row[token] for row, token in zip(kept, response.token_ids, strict=True)])
            np.testing.assert_allclose(response.logprobs, expected, atol=TOLERANCE)


def test_several_engines_draw_what_one_does(engines: dict[str, Any]) -> None:
    sampling = replace(GREEDY, temperature=1.0)
    one, two = run(engines["hf"], sampling), run(engines["two"], sampling)
    assert {name: r.token_ids.tolist() for name, r in one.items()} == {
        name: r.token_ids.tolist() for name, r in two.items()
    }


def test_what_vllm_must_copy_is_aliased(engines: dict[str, Any]) -> None:
    """Its parameters have the names and shapes of the owner's; vLLM's are fused."""
    assert engines["hf"].sync(0).bytes_moved == engines["two"].sync(0).bytes_moved == 0
    assert engines["vllm"].sync(0).bytes_moved > 0
    assert "0 bytes to move" in engines["lines"]["hf"][0]
