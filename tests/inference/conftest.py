"""A miniature trainer with a real vLLM engine: tiny HF models, their weights in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.interface import GenerateRequest
from megarl.inference.vllm.engine import VllmEngine
from megarl.records import token_ids
from tests.inference.mini_trainer import MiniTrainer, SharedWeights

MAX_MODEL_LEN = 256
FAMILIES = ("llama", "qwen3")
SIZES = {
    "vocab_size": 250,  # not a multiple of 64: the engine pads it to 256
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # spreads the logits, so that a wrong weight shows
}


class FusedWeights(SharedWeights):
    """Hugging Face weights as vLLM lays them out (q|k|v, gate|up, padding)."""

    def reader(self, model: transformers.PreTrainedModel) -> Callable[[str], torch.Tensor]:
        """Join the parts of what vLLM fuses."""
        state = model.state_dict()
        return lambda name: torch.cat([state[part] for part in _hf_names(name)])


class VllmTrainer(MiniTrainer):
    """With requests for every test."""

    def __init__(self, engine: VllmEngine, model: transformers.PreTrainedModel) -> None:
        super().__init__(engine, model, FusedWeights)

    def requests(self, count: int, max_new_tokens: int, prompt_length: int = 9) -> list[GenerateRequest]:
        generator = torch.Generator().manual_seed(3)
        return [
            GenerateRequest(
                f"r{i}",
                token_ids(torch.randint(250, (prompt_length + i % 3,), generator=generator)),
                max_new_tokens,
                seed=100 + i,
            )
            for i in range(count)
        ]


def _hf_names(engine_name: str) -> list[str]:
    for fused, parts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    ):
        if fused in engine_name:
            return [engine_name.replace(fused, part) for part in parts]
    return [engine_name]


def _make_model(family: str, directory: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(5)
    if family == "llama":
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=True)
        model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():  # HF starts norms at 1, where a missing or swapped one would not show
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return model.eval()


@pytest.fixture(scope="module")
def _trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VllmTrainer]]:
    """Start both engines concurrently: importing vllm takes most of the time."""
    config = EngineConfig(kv_cache_gib=0.05, num_threads=1)
    models, engines = {}, {}
    for family in FAMILIES:
        directory = tmp_path_factory.mktemp(family)
        models[family] = _make_model(family, directory)
        engines[family] = VllmEngine.start(
            directory,
            config,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            seed=1,
            log_dir=directory / "logs",
        )
    for engine in engines.values():
        engine.wait_ready()
    yield {family: VllmTrainer(engines[family], models[family]) for family in FAMILIES}
    for engine in engines.values():
        engine.shutdown()
    stop_ray()


@pytest.fixture(params=FAMILIES)
def trainer(request: pytest.FixtureRequest, _trainers: dict[str, VllmTrainer]) -> VllmTrainer:
    """A trainer with its first weights; tied and with q/k norms (qwen3) or untied and without (llama)."""
    chosen = _trainers[request.param]
    chosen.reset()
    return chosen
