"""Memory that a real forward pass keeps for its backward pass, against the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.simulate.activations import Microbatch, Recompute, chunks_in_flight, head_bytes, layer_bytes
from tests.simulate import measure
from tests.trainer.world import world

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, EXPERTS),
}
COUNT, LENGTH = 4, 64


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    for name, (config, model, options) in FAMILIES.items():
        model(config(**(SIZES | options))).save_pretrained(folder / name)
    return {name: str(folder / name) for name in FAMILIES}


TP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "off"),
    ("llama", {}, "selective"),
    ("qwen3", {}, "off"),
    ("qwen3", {}, "selective"),
    ("qwen3", {}, "full"),
    ("qwen3", TP2, "off"),
    ("qwen3", CP2, "off"),
    ("qwen3_moe", {}, "off"),
    ("qwen3_moe", TP2, "off"),
    ("qwen3_moe", TP2, "full"),
    ("qwen3_moe", CP2, "selective"),
    ("qwen3_moe", {"expert_parallel_size": 2}, "off"),
]


@pytest.mark.parametrize(
    ("family", "parallel", "recompute"),
    CASES,
    ids=[f"{family}-{next(iter(parallel), 'one')}-{recompute}" for family, parallel, recompute in CASES],
)
def test_a_real_forward_pass_keeps_what_the_formulas_say(
    model_dirs: dict[str, str], family: str, parallel: dict[str, Any], recompute: Recompute
) -> None:
    size = 2 if parallel else 1
    options = parallel | {"num_processes": size, "activation_recompute": recompute}
    kept = world(size).run(measure.kept_bytes, model_dirs[family], COUNT, LENGTH, parallel=options)
    layout = ParallelLayout(
        tensor=parallel.get("tensor_parallel_size", 1),
        context=parallel.get("context_parallel_size", 1),
        sequence_parallel=parallel.get("sequence_parallel", False),
        expert=parallel.get("expert_parallel_size", 1),
        data=parallel.get("expert_parallel_size", 1),
    )
    spec = load_architecture(model_dirs[family]).spec
    batch = Microbatch(COUNT * LENGTH / layout.context / layout.data, 4)
    formula = head_bytes(spec, layout, batch)
    formula += sum(layer_bytes(spec, layer, layout, batch, recompute) for layer in range(spec.num_layers))
    formula += batch.tokens * 2 * spec.head_dim * 4  # cosine and sine: once for all layers, not planned
    # Experts see more tokens on one rank than on another, but not in the sum.
    assert sum(kept) / size == pytest.approx(formula, rel=0.03), [each / formula for each in kept]


def test_in_flight_on_the_first_stage_is_the_papers() -> None:
    """Korthikanti et al., section 4.2.3: of ``stages`` microbatches, L (1 + (p - 1) / (p m)) layers."""
    for stages, virtual in ((2, 2), (4, 3), (8, 2)):
        chunks = chunks_in_flight(ParallelLayout(pipeline=stages, virtual=virtual), 0, None)
        layers_per_chunk = 1 / (stages * virtual)
        assert chunks * layers_per_chunk == pytest.approx(1 + (stages - 1) / (stages * virtual))


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (4, 1), (4, 2), (2, 3)])
def test_in_flight_against_megatrons_schedule(stages: int, virtual: int) -> None:
    """Its number of warm-up passes, then one forward before each backward."""
    layout = ParallelLayout(pipeline=stages, virtual=virtual)
    for microbatches in (stages, 2 * stages, 3 * stages):
        for stage in range(stages):
            warmup = _warmup(stages, virtual, stage, microbatches)
            passes, alive, most, done = microbatches * virtual, 0, 0, 0
            for step in range(passes):
                alive += 1
                most = max(most, alive)
                if step >= warmup:
                    alive -= 1
                    done += 1
            assert done + alive == passes
            assert chunks_in_flight(layout, stage, microbatches) == most, (stage, microbatches)


def _warmup(stages: int, virtual: int, stage: int, microbatches: int) -> int:
    if virtual == 1:
        return min(stages - stage - 1, microbatches)
    return min((stages - stage - 1) * 2 + (virtual - 1) * stages, microbatches * virtual)
