"""Trainer layouts x engine layouts x families: after a training step the engine is the exported model.

Every trainer is real Megatron on gloo, every engine real. The reference is Hugging Face on an
export of the same weights, which passes through none of the weight sync.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers

from megarl.cluster.ray_runtime import stop_ray
from megarl.config.rollout import EngineConfig
from megarl.inference.backends import engine_class
from megarl.inference.interface import GenerateRequest, SamplingConfig
from megarl.loops.engine_setup import attach_weights, region_queries
from megarl.models import load_architecture
from megarl.records import token_ids
from megarl.trainer.interface import Transport
from megarl.weights.checksum import RegionQuery
from tests.inference.driving import generate
from tests.trainer import ranks
from tests.trainer.world import world

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": 250,  # not a multiple of 64: both sides pad it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # spreads the logits, so that a wrong weight shows
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
# vLLM's CPU kernel of latent attention is compiled for one size, 512 + 64.
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 40,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, EXPERTS),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, LATENT),
}
WITH_EXPERTS = ("qwen3_moe", "deepseek_v3")
# name -> (trainer ranks, parallel section, distributed optimizer)
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one": (1, {}, False),
    "tp2": (2, {"tensor_parallel_size": 2}, False),
    "pp2": (2, {"pipeline_parallel_size": 2}, False),
    "tp2xpp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, False),
    "dp2-distributed": (2, {}, True),
    "vpp": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, False),
    "ep2": (2, {"expert_parallel_size": 2}, False),
    "tp2xep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2, "sequence_parallel": True}, False),
}


class Bench:
    """One engine; trainers of several layouts attach to it in turn."""

    def __init__(
        self,
        family: str,
        engine_ranks: int,
        directory: Path,
        dtype: Literal["auto", "bfloat16"] = "auto",
        *,
        expert_parallel: bool = False,
        backend: Literal["vllm", "hf"] = "vllm",
    ) -> None:
        self.family, self.engine_ranks, self.directory = family, engine_ranks, directory
        self.model_dir = directory / "model"
        config_class, model_class, options = MODELS[family]
        torch.manual_seed(0)
        model_class(config_class(**(SIZES | options))).save_pretrained(self.model_dir)
        config = EngineConfig(
            backend=backend,
            dtype=dtype,
            kv_cache_gib=0.02,
            max_num_seqs=8,
            num_threads=1,
            tensor_parallel_size=engine_ranks,
            expert_parallel=expert_parallel,
        )
        self.engine = engine_class(backend).start(
            self.model_dir, config, dtype="float32", max_model_len=128, seed=1, log_dir=directory
        )
        self.version = 0

    def checksums(self) -> list[tuple[RegionQuery, int]]:
        """Every region the engine holds, with its checksum there."""
        return [
            (query, checksum.value)
            for plan, sums in zip(self.engine.plans, self.engine.checksums(), strict=True)
            for query, checksum in zip(region_queries(plan, sums), sums, strict=True)
        ]

    def check(self, layout: str, *, same_layout: bool, transport: Transport = "auto") -> int:
        """Train a step under ``layout`` and compare; returns the bytes that the weight sync moved."""
        size, parallel, distributed = LAYOUTS[layout]
        if self.family in WITH_EXPERTS and "tensor_parallel_size" in parallel:
            parallel = parallel | {"sequence_parallel": True}  # experts need it
        export_dir = self.directory / f"export-{layout}"
        owners = world(size).run(
            ranks.train_export_and_offer,
            str(self.model_dir),
            str(export_dir),
            distributed,
            transport,
            parallel=parallel,
        )[0]
        lines = attach_weights(self.engine, load_architecture(self.model_dir), owners, transport)
        self.version += 1
        report = self.engine.sync(self.version)
        checksums = self.checksums()
        mismatched = world(size).run(ranks.wrong_checksums, checksums)
        assert not any(mismatched), lines
        if transport == "peer":
            sizes = sum(math.prod(query.source.shape) * 4 for query, _ in checksums)
            assert report.bytes_moved == sizes, "all of it, once"
        requests = [
            GenerateRequest(f"{layout}-{n}", token_ids([(7 * n + k) % 250 for k in range(5 + n)]), 12, seed=n)
            for n in range(6)
        ]
        responses = list(generate(self.engine, requests, SamplingConfig(1.0, (), True)))
        prompts = {request.request_id: request.prompt_ids for request in requests}
        model = MODELS[self.family][1].from_pretrained(export_dir).eval()  # type: ignore[attr-defined]
        worst = 0.0
        with torch.no_grad():
            for response in responses:
                ids = [*prompts[response.request_id].tolist(), *response.token_ids.tolist()]
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                for place, (token, value) in enumerate(
                    zip(response.token_ids, response.logprobs, strict=True)
                ):
                    at = len(prompts[response.request_id]) + place - 1
                    worst = max(worst, abs(float(logits[at, token]) - value))
        assert worst < TOLERANCE, lines
        if same_layout and self.family not in WITH_EXPERTS:
            assert report.bytes_moved == 0, lines
        return report.bytes_moved


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    family, engine_ranks, *whole_experts = request.param
    directory = tmp_path_factory.mktemp(f"{family}-tp{engine_ranks}")
    bench = Bench(family, engine_ranks, directory, expert_parallel=bool(whole_experts))
    yield bench
    bench.engine.shutdown()
    stop_ray()


# The weights arrive (checksums equal), but vLLM 0.32's CPU engine computes other logprobs than Hugging Face.
MARKS = {
    "deepseek_v3": pytest.mark.xfail(reason="vLLM's CPU kernels of latent attention", raises=AssertionError)
}
CASES = [
    pytest.param(
        (family, engine_ranks),
        layout,
        id=f"{family}-{layout}-to-tp{engine_ranks}",
        marks=MARKS.get(family, ()),
    )
    for family in MODELS
    for engine_ranks in (1, 2)
    for layout in LAYOUTS
    if (family in WITH_EXPERTS or "ep2" not in layout)
    and (family != "deepseek_v3" or layout in ("one", "tp2xep2", "pp2"))
]


@pytest.mark.parametrize(("bench", "layout"), CASES, indirect=["bench"])
def test_the_engine_is_the_exported_model(bench: Bench, layout: str) -> None:
    same = (layout == "tp2") if bench.engine_ranks == 2 else layout in ("one", "dp2-distributed")
    bench.check(layout, same_layout=same)


@pytest.fixture(scope="module")
def hf_bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(request.param, 1, tmp_path_factory.mktemp(f"{request.param}-hf"), backend="hf")
    yield bench
    bench.engine.shutdown()
    stop_ray()


@pytest.mark.parametrize(
    ("hf_bench", "layout"),
    [
        (family, layout)
        for family in MODELS
        for layout in ("one", "tp2", "pp2", "tp2xep2")
        if (family in WITH_EXPERTS or layout != "tp2xep2") and (family, layout) != ("deepseek_v3", "tp2")
    ],
    indirect=["hf_bench"],
)
def test_the_hugging_face_engine_is_the_exported_model(hf_bench: Bench, layout: str) -> None:
    """Parts of fused parameters are parameters there; those that lie whole with one rank are aliased."""
    aliased = "tp2" not in layout  # each parameter lies whole with one rank
    assert (hf_bench.check(layout, same_layout=aliased) == 0) == aliased


@pytest.mark.parametrize("hf_bench", ["llama"], indirect=True)
def test_the_hugging_face_engine_point_to_point(hf_bench: Bench) -> None:
    hf_bench.check("tp2", same_layout=False, transport="peer")
    hf_bench.check("one", same_layout=True)


@pytest.mark.parametrize(
    "bench", [("qwen3_moe", 2, "whole experts")], indirect=True, ids=["qwen3_moe-tp2-ep2"]
)
@pytest.mark.parametrize("layout", ["one", "ep2", "pp2", "tp2xep2"])
def test_an_engine_of_whole_experts(bench: Bench, layout: str) -> None:
    """Experts dealt to the engine's tensor ranks; where the trainer deals them alike, nothing moves."""
    moved = bench.check(layout, same_layout=False)
    assert (moved == 0) == (layout == "tp2xep2")


@pytest.mark.parametrize(
    ("bench", "layout"),
    [
        pytest.param(("llama", 1), "tp2xpp2", id="llama-tp2xpp2-to-tp1"),
        pytest.param(("qwen3_moe", 2), "ep2", id="qwen3_moe-ep2-to-tp2"),
    ],
    indirect=["bench"],
)
def test_point_to_point(bench: Bench, layout: str) -> None:
    """Nothing is mapped: every byte comes from its owner through a socket, as between hosts."""
    bench.check(layout, same_layout=False, transport="peer")
    bench.check(layout, same_layout=False)  # and back to mapped memory
