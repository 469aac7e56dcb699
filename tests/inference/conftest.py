"""A miniature trainer with a real vLLM engine: tiny HF models, their weights in shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.interface import GeneratedResponse, GenerateRequest
from megarl.inference.vllm.engine import VllmEngine
from megarl.records import token_ids
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, SharedStorage, SourceView, WeightPlan

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


class SharedWeights:
    """One shared buffer that holds HF weights as the engine lays them out (q|k|v, gate|up, padding)."""

    def __init__(self, params: dict[str, ParamInfo], dtype: str) -> None:
        self.params, self.dtype = params, dtype
        sizes = [torch.Size(info.shape).numel() for info in params.values()]
        self.buffer = torch.zeros(sum(sizes), dtype=getattr(torch, dtype))
        pieces = self.buffer.split(sizes)
        self.views = {
            name: piece.view(params[name].shape) for name, piece in zip(params, pieces, strict=True)
        }
        self.storage = SharedStorage(self.buffer.untyped_storage()._share_filename_cpu_())

    @torch.no_grad()
    def load(self, model: transformers.PreTrainedModel) -> None:
        state = model.state_dict()
        for name, view in self.views.items():
            weight = torch.cat([state[part] for part in _hf_names(name)])
            view[: len(weight)].copy_(weight)  # rows beyond are vocabulary padding

    def source(self, name: str, start: int = 0, stop: int | None = None) -> SourceView:
        view = self.views[name][start:stop]
        return SourceView(0, self.dtype, view.storage_offset(), tuple(view.shape), tuple(view.stride()))

    def alias_plan(self) -> WeightPlan:
        return WeightPlan([self.storage], [Alias(name, self.source(name)) for name in self.params], [])

    def copy_plan(self) -> WeightPlan:
        """Every parameter in two regions, as if two trainer ranks held a half each."""
        copies = []
        for name, info in self.params.items():
            middle = info.shape[0] // 2
            rest = tuple((0, size) for size in info.shape[1:])
            for start, stop in ((0, middle), (middle, info.shape[0])):
                copies.append(Copy(name, ((start, stop), *rest), self.source(name, start, stop)))
        return WeightPlan([self.storage], [], copies)


class MiniTrainer:
    """An HF model as the reference, its shared weights, and the engine that aliases them."""

    def __init__(self, engine: VllmEngine, model: transformers.PreTrainedModel) -> None:
        self.engine, self.model = engine, model
        self.initial = {name: value.clone() for name, value in model.state_dict().items()}
        [self.params] = engine.describe_parameters()
        self.shared = SharedWeights(self.params, "float32")

    def reset(self) -> None:
        """Back to the first weights, aliased, policy version 0."""
        self.model.load_state_dict(self.initial)
        self.shared.load(self.model)
        self.engine.attach([self.shared.alias_plan()])
        self.engine.sync(0)

    @torch.no_grad()
    def change_weights(self) -> None:
        """Change the weights as an optimizer step does, without notifying the engine."""
        generator = torch.Generator().manual_seed(11)
        for param in self.model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
        self.shared.load(self.model)

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

    @torch.no_grad()
    def logprob_error(
        self, requests: list[GenerateRequest], responses: list[GeneratedResponse], temperature: float
    ) -> float:
        """Largest |engine - HF| over all response tokens; every request must have been answered."""
        prompts = {request.request_id: request.prompt_ids for request in requests}
        assert sorted(prompts) == sorted(response.request_id for response in responses)
        errors = []
        for response in responses:
            prompt = prompts[response.request_id]
            logits = self.model(torch.tensor([[*prompt, *response.token_ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
            expected = (logits / temperature).log_softmax(-1)
            expected = expected.gather(-1, torch.tensor(response.token_ids).long()[:, None])[:, 0]
            errors.append((expected - torch.tensor(response.logprobs)).abs().max().item())
        return max(errors)


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
def _trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, MiniTrainer]]:
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
    yield {family: MiniTrainer(engines[family], models[family]) for family in FAMILIES}
    for engine in engines.values():
        engine.shutdown()
    stop_ray()


@pytest.fixture(params=FAMILIES)
def trainer(request: pytest.FixtureRequest, _trainers: dict[str, MiniTrainer]) -> MiniTrainer:
    """A trainer with its first weights; tied and with q/k norms (qwen3) or untied and without (llama)."""
    chosen = _trainers[request.param]
    chosen.reset()
    return chosen
