"""A miniature trainer beside a real engine: a reference model, its weights in shared memory."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.records import TokenIds
from megarl.weights.sync_plan import Alias, Copy, ParamInfo, SharedStorage, SourceView, WeightPlan
from tests.inference.driving import generate


class SharedWeights(ABC):
    """One shared buffer that holds a model's weights as the engine lays them out."""

    def __init__(self, params: dict[str, ParamInfo], dtype: str) -> None:
        self.params, self.dtype = params, dtype
        sizes = [torch.Size(info.shape).numel() for info in params.values()]
        self.buffer = torch.zeros(sum(sizes), dtype=getattr(torch, dtype))
        pieces = self.buffer.split(sizes)
        self.views = {
            name: piece.view(params[name].shape) for name, piece in zip(params, pieces, strict=True)
        }
        self.storage = SharedStorage(self.buffer.untyped_storage()._share_filename_cpu_())

    @abstractmethod
    def reader(self, model: Any) -> Callable[[str], torch.Tensor]:
        """Return the function from an engine parameter's name to the model's weight."""

    @torch.no_grad()
    def load(self, model: Any) -> None:
        read = self.reader(model)
        for name, view in self.views.items():
            weight = read(name)
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
    """A model as the reference, its shared weights, and the engine that aliases them."""

    def __init__(self, engine: Any, model: Any, kind: type[SharedWeights]) -> None:
        self.engine, self.model = engine, model
        self.initial = {name: value.clone() for name, value in model.state_dict().items()}
        [self.params] = engine.describe_parameters()
        self.weights = kind(self.params, "float32")

    def reset(self) -> None:
        """Back to the first weights, aliased, policy version 0."""
        self.model.load_state_dict(self.initial)
        self.weights.load(self.model)
        self.engine.attach([self.weights.alias_plan()])
        self.engine.sync(0)

    @torch.no_grad()
    def change_weights(self) -> None:
        """Change the weights as an optimizer step does, without notifying the engine."""
        generator = torch.Generator().manual_seed(11)
        for param in self.model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
        self.weights.load(self.model)

    def logprob_error(
        self,
        requests: list[GenerateRequest],
        responses: list[GeneratedResponse],
        temperature: float = 1.0,
    ) -> float:
        """Largest |engine - reference| over all response tokens; every request must have been answered."""
        prompts = {request.request_id: request.prompt_ids for request in requests}
        assert sorted(prompts) == sorted(response.request_id for response in responses)
        errors = []
        for response in responses:
            expected = logprobs_of(self.model, prompts[response.request_id], response.token_ids, temperature)
            errors.append((expected - torch.tensor(response.logprobs)).abs().max().item())
        return max(errors)


@torch.no_grad()
def logprobs_of(model: Any, prompt: TokenIds, response: TokenIds, temperature: float = 1.0) -> torch.Tensor:
    """The reference's logprobs [N] of a response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response).long()[:, None])[:, 0]


def check_pause(
    trainer: MiniTrainer, requests: list[GenerateRequest], sampling: SamplingConfig, tolerance: float
) -> None:
    """A paused engine keeps requests waiting, takes weights, and samples all of them with these."""
    trainer.engine.pause()
    responses: list[GeneratedResponse] = []
    consumer = threading.Thread(target=lambda: responses.extend(generate(trainer.engine, requests, sampling)))
    consumer.start()
    time.sleep(0.5)
    assert trainer.engine.health().num_unfinished_requests == len(requests) and not responses
    trainer.change_weights()
    trainer.engine.sync(4)
    trainer.engine.resume()
    consumer.join(timeout=60)
    assert {r.policy_version for r in responses} == {4}
    assert trainer.logprob_error(requests, responses) < tolerance
