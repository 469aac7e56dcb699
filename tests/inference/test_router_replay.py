"""Experts that vLLM chose: returned for every token, Hugging Face's own, and replayed by the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megarl.batching.train_batch import train_batch
from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.inference.vllm.build import KV_BLOCK_SIZE
from megarl.inference.vllm.engine import VllmEngine
from megarl.loops.engine_setup import attach_weights
from megarl.models import load_architecture
from megarl.records import Sample, TokenSequence, token_ids
from tests.inference.driving import generate
from tests.trainer import ranks, router_ranks
from tests.trainer.world import world
from tests.weights.test_engine_matrix import EXPERTS, SIZES

pytestmark = pytest.mark.slow

LAYERS, TOP_K = SIZES["num_hidden_layers"], EXPERTS["num_experts_per_tok"]
SHARED = [(13 * k + 5) % 250 for k in range(2 * KV_BLOCK_SIZE + 7)]  # two whole blocks and a bit


@dataclass(frozen=True)
class Rollout:
    model: transformers.PreTrainedModel
    model_dir: Path
    requests: dict[str, GenerateRequest]
    responses: list[GeneratedResponse]

    def sequences(self) -> list[TokenSequence]:
        """As GRPO trains on them."""
        samples = []
        for response in self.responses:
            prompt = self.requests[response.request_id].prompt_ids
            sample = Sample(0, prompt, response.token_ids, response.logprobs, 1, "length")
            sample.experts = response.experts
            samples.append(sample)
        return list(train_batch(samples))

    def errors(self, logprobs: list[list[float]]) -> np.ndarray:
        """|trainer's - engine's| of all response tokens."""
        parts = []
        for response, values in zip(self.responses, logprobs, strict=True):
            mine = np.array(values[-len(response.token_ids) :])
            parts.append(np.abs(mine - np.array(response.logprobs)))
        return np.concatenate(parts)


def roll_out(directory: Path, dtype: str) -> Rollout:
    """A Qwen3-MoE under a real trainer and a real engine that records; many share most of their prompt."""
    model_dir = directory / "model"
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | EXPERTS)).eval()
    model.save_pretrained(model_dir)
    config = EngineConfig(dtype=dtype, kv_cache_gib=0.02, max_num_seqs=4, num_threads=1)
    engine = VllmEngine.start(
        model_dir,
        config,
        dtype="float32",
        max_model_len=128,
        seed=1,
        log_dir=directory,
        record_routing=True,
    )
    try:
        [owners] = world(1).run(router_ranks.offer, str(model_dir))
        attach_weights(engine, load_architecture(model_dir), owners)
        engine.sync(1)
        requests = [GenerateRequest(f"s{n}", token_ids([*SHARED, n]), 20, seed=n) for n in range(8)]
        requests += [
            GenerateRequest(f"r{n}", token_ids(ranks.make_sequences(n)[0].token_ids), 20, n) for n in range(4)
        ]
        responses = list(generate(engine, requests, SamplingConfig(ranks.TEMPERATURE, (), True)))
    finally:
        engine.shutdown()
    return Rollout(model, model_dir, {r.request_id: r for r in requests}, responses)


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rollout]:
    yield roll_out(tmp_path_factory.mktemp("replay"), "float32")
    stop_ray()


@torch.no_grad()
def hf_choices(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """[n, layers, k], each token's in the order of their numbers."""
    found: list[torch.Tensor] = []
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _m, _i, out: found.append(out[2])) for gate in gates]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack(found, dim=1).numpy(), axis=-1)


def test_every_token_brings_the_experts_hugging_face_would_choose(rollout: Rollout) -> None:
    """Prompts found in the prefix cache too: most requests had two blocks of theirs there."""
    same = total = 0
    for response in rollout.responses:
        prompt = rollout.requests[response.request_id].prompt_ids
        ids = [*prompt.tolist(), *response.token_ids.tolist()]
        assert response.experts is not None
        assert response.experts.shape == (len(ids) - 1, LAYERS, TOP_K)
        mine, theirs = np.sort(response.experts, axis=-1), hf_choices(rollout.model, ids)[:-1]
        same += int((mine == theirs).all(-1).sum())
        total += mine.shape[0] * LAYERS
    assert same / total > 0.999, "but for near ties"


def test_replayed_by_the_trainer_they_give_the_engines_logprobs(rollout: Rollout) -> None:
    sequences = rollout.sequences()
    for size, layout in ((1, {}), (2, {"context_parallel_size": 2})):
        if size == 1:
            [found] = world(1).run(
                router_ranks.replayed_logprobs, str(rollout.model_dir), sequences, ranks.TEMPERATURE
            )
            assert rollout.errors(found).max() < 1e-4
        arguments = (str(rollout.model_dir), [sequences], {}, "auto")
        [first, *_] = world(size).run(router_ranks.train_routed, *arguments, parallel=layout)
        [values] = first["log"]
        assert values["router_replay_rerouted"] < 1e-3
        assert values["worst"] < 1e-4


def test_a_bfloat16_engine_chooses_differently_and_replay_mends_it(tmp_path: Path) -> None:
    """Why replay exists: rounding changes choices, and a changed choice moves the logprob far more."""
    rollout = roll_out(tmp_path, "bfloat16")
    sequences = rollout.sequences()
    plain = [replace(s, experts=None) for s in sequences]
    model = str(rollout.model_dir)
    [replayed], [free] = (
        world(1).run(router_ranks.replayed_logprobs, model, s, ranks.TEMPERATURE) for s in (sequences, plain)
    )
    moved = sum(
        int(
            (np.sort(s.experts[:-1], axis=-1) != hf_choices(rollout.model, s.token_ids.tolist())[:-1])
            .any(-1)
            .sum()
        )
        for s in sequences
        if s.experts is not None
    )
    assert moved > 0
    with_replay, without = rollout.errors(replayed), rollout.errors(free)
    print(f"moved {moved}; |difference| mean {without.mean():.4f} -> {with_replay.mean():.4f}")
    assert with_replay.mean() < without.mean()
