"""A trainer in miniature beside a real Hugging Face engine: its weights in shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.backends import engine_class
from megarl.inference.interface import GeneratedResponse, GenerateRequest
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, SharedStorage, SourceView, WeightPlan
from tests.inference.hf.models import MAX_MODEL_LEN, logprobs_of, make_model, parameters


class Weights:
    """One shared buffer with every parameter of a model."""

    def __init__(self, params: dict[str, ParamInfo], dtype: str) -> None:
        self.params, self.dtype = params, dtype
        sizes = [torch.Size(info.shape).numel() for info in params.values()]
        self.buffer = torch.zeros(sum(sizes), dtype=getattr(torch, dtype))
        pieces = self.buffer.split(sizes)
        self.views = {n: p.view(params[n].shape) for n, p in zip(params, pieces, strict=True)}
        self.storage = SharedStorage(self.buffer.untyped_storage()._share_filename_cpu_())

    @torch.no_grad()
    def load(self, model: torch.nn.Module) -> None:
        theirs = parameters(model)
        for name, view in self.views.items():
            view.copy_(theirs[name])

    def source(self, name: str) -> SourceView:
        view = self.views[name]
        return SourceView(0, self.dtype, view.storage_offset(), tuple(view.shape), tuple(view.stride()))

    def alias_plan(self) -> WeightPlan:
        return WeightPlan([self.storage], [Alias(name, self.source(name)) for name in self.params], [])

    def copy_plan(self) -> WeightPlan:
        copies = [
            Copy(name, tuple((0, size) for size in info.shape), self.source(name))
            for name, info in self.params.items()
        ]
        return WeightPlan([self.storage], [], copies)


class MiniTrainer:
    """A reference model, its shared weights, and the engine that aliases them."""

    def __init__(self, engine: Any, model: Any) -> None:
        self.engine, self.model = engine, model
        self.initial = {name: value.clone() for name, value in model.state_dict().items()}
        [self.params] = engine.describe_parameters()
        self.weights = Weights(self.params, "float32")

    def reset(self) -> None:
        """Back to the first weights, aliased, policy version 0."""
        self.model.load_state_dict(self.initial)
        self.weights.load(self.model)
        self.engine.attach([self.weights.alias_plan()])
        self.engine.sync(0)

    @torch.no_grad()
    def change_weights(self) -> None:
        """What an optimizer step does, as far as the engine can tell. The engine is not told."""
        generator = torch.Generator().manual_seed(11)
        for param in self.model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
        self.weights.load(self.model)

    def logprob_error(self, requests: list[GenerateRequest], responses: list[GeneratedResponse]) -> float:
        """Largest difference from the reference; every request must have been answered."""
        prompts = {request.request_id: request.prompt_ids for request in requests}
        assert sorted(prompts) == sorted(response.request_id for response in responses)
        return max(
            (logprobs_of(self.model, prompts[r.request_id], r.token_ids) - torch.tensor(r.logprobs))
            .abs()
            .max()
            for r in responses
        ).item()


@pytest.fixture(scope="module")
def _trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniTrainer]:
    directory = tmp_path_factory.mktemp("qwen3")
    model = make_model("qwen3")
    model.config.save_pretrained(directory)
    engine = engine_class("hf").start(
        directory,
        EngineConfig(backend="hf", kv_cache_gib=0.05, num_threads=1),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_dir=directory / "logs",
    )
    engine.wait_ready()
    yield MiniTrainer(engine, model)
    engine.shutdown()
    stop_ray()


@pytest.fixture
def trainer(_trainer: MiniTrainer) -> MiniTrainer:
    """With its first weights."""
    _trainer.reset()
    return _trainer
