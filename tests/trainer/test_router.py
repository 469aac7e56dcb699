"""Routing: choices replayed, loads balanced, bias moved; against Hugging Face and under every layout."""

from __future__ import annotations

import functools
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megarl.records import TokenSequence
from tests.models.tiny import make_model
from tests.trainer import ranks, router_ranks
from tests.trainer.test_parallel import LAYOUTS
from tests.trainer.world import world

SIZES = {"qwen3-moe": (2, 4, 2), "qwen3-moe-mixed-tied": (1, 4, 2), "deepseek-v3": (1, 8, 2)}
"""Layers with experts, experts, experts per token."""


def foreign(sequence: TokenSequence, model: str, seed: int) -> TokenSequence:
    """With experts drawn at random for most of its tokens."""
    layers, experts, top_k = SIZES[model]
    draw = np.random.default_rng(seed)
    n = len(sequence.token_ids)
    chosen = np.argsort(draw.random((n, layers, experts)), axis=-1)[..., :top_k].astype(np.int16)
    chosen[draw.random(n) < 0.1] = -1
    return replace(sequence, experts=chosen)


@pytest.mark.parametrize("model", ["qwen3-moe", "deepseek-v3"])
def test_replaying_ones_own_choices_changes_nothing(model_dirs: dict[str, str], model: str) -> None:
    [(own, again)] = world(1).run(router_ranks.replay_of_oneself, model_dirs[model])
    for plain, replayed in zip(own["log"], again["log"], strict=True):
        assert replayed.pop("router_replay_rerouted") == 0.0
        assert replayed == plain
    for name, value in own["weights"].items():
        assert np.array_equal(again["weights"][name], value), name


def replay_in_hf(model: transformers.PreTrainedModel, experts: np.ndarray) -> None:
    """Put the router's choices in place of Hugging Face's, weights from its own scores."""
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    for layer, gate in enumerate(gates):
        given = torch.from_numpy(experts[:, layer].astype(np.int64))
        original = type(gate).forward

        def forward(
            self: Any, hidden: torch.Tensor, given: torch.Tensor = given, original: Any = original
        ) -> Any:
            logits, _, own = original(self, hidden)
            chosen = torch.where(given >= 0, given, own)
            sigmoid = hasattr(self, "e_score_correction_bias")
            weights = (logits.sigmoid() if sigmoid else logits.softmax(-1)).gather(1, chosen)
            if self.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights * getattr(self, "routed_scaling_factor", 1.0), chosen

        gate.forward = types.MethodType(forward, gate)


@pytest.mark.parametrize("model", list(SIZES))
def test_foreign_choices_compute_what_hf_would_with_them(model_dirs: dict[str, str], model: str) -> None:
    sequences = [foreign(s, model, i) for i, s in enumerate(ranks.make_sequences(3, count=4))]
    [found] = world(1).run(router_ranks.replayed_logprobs, model_dirs[model], sequences)
    moved = 0.0
    for sequence, ours in zip(sequences, found, strict=True):
        ids = torch.tensor(sequence.token_ids)
        mask = torch.tensor(sequence.loss_mask[1:]).bool()
        hf = make_model(model)
        assert sequence.experts is not None
        with torch.no_grad():
            plain = hf(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            replay_in_hf(hf, sequence.experts)
            expected = hf(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        if mask.any():
            assert (torch.tensor(ours) - expected)[mask].abs().max() < 1e-5
            moved = max(moved, float((plain - expected)[mask].abs().max()))
    assert moved > 1e-3, "the choices matter"


ROUTER: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"aux_loss_coef": 0.1},
    "deepseek-v3": {"aux_loss_coef": 0.1, "bias_update_rate": 0.02},
}


def make_steps(model: str, groups: bool = False) -> list[list[TokenSequence]]:
    make = ranks.make_groups if groups else ranks.make_sequences
    steps = []
    for seed in range(2):
        sequences = [foreign(s, model, 10 * seed + i) for i, s in enumerate(make(seed))]
        if groups:  # a group's samples have their prompt's choices in common, as in the engine's prefix cache
            firsts: dict[tuple[int, ...], np.ndarray] = {}
            for s in sequences:
                prompt = s.num_prompt_tokens
                assert s.experts is not None
                s.experts[:prompt] = firsts.setdefault(tuple(s.token_ids[:prompt]), s.experts[:prompt])
        steps.append(sequences)
    return steps


@functools.cache
def one_rank(model_dir: str, model: str) -> dict[str, Any]:
    [result] = world(1).run(router_ranks.train_routed, model_dir, make_steps(model), ROUTER[model])
    assert 0.2 < result["log"][0]["router_replay_rerouted"] < 1
    assert result["log"][0]["router_aux_loss"] > 1
    return dict(result)


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    for a, b in zip(one["log"], two["log"], strict=True):
        ranks.take_split_counts(b)
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-4 if key == "grad_norm" else 1e-5, abs=2e-6), key
    for name, value in one["weights"].items():
        assert np.abs(two["weights"][name] - value).max() < 1e-5, name


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("qwen3-moe", "cp2"),
        ("qwen3-moe", "pp2"),
        ("deepseek-v3", "tp2-ep2"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("deepseek-v3", "cp2"),
                ("deepseek-v3", "one-recompute-full"),
                ("qwen3-moe", "tp2-ep2-pp2"),
                ("qwen3-moe", "tp2-ep2-recompute-full"),
            )
        ],
    ],
)
def test_replay_and_balance_equal_one_rank(model_dirs: dict[str, str], model: str, layout: str) -> None:
    """One microbatch in all: the load-balancing loss is one of a microbatch."""
    expected = one_rank(model_dirs[model], model)
    parallel, _ = LAYOUTS[layout]
    size = 1 if layout.startswith("one") else 4 if layout == "tp2-ep2-pp2" else 2
    arguments = (model_dirs[model], make_steps(model), ROUTER[model])
    assert_same(expected, world(size).run(router_ranks.train_routed, *arguments, parallel=parallel)[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "ep2", "cp2-ep2", "cp2-ep2-whole"])
def test_replay_over_many_microbatches_equals_one(model_dirs: dict[str, str], layout: str) -> None:
    arguments = (model_dirs["deepseek-v3"], make_steps("deepseek-v3"), {"bias_update_rate": 0.02}, "off")
    [expected] = world(1).run(router_ranks.train_routed, *arguments, 4096)
    parallel, _ = LAYOUTS[layout]
    assert_same(expected, world(2).run(router_ranks.train_routed, *arguments, 96, parallel=parallel)[0])


def test_whole_sequences_balance_as_on_data_ranks(model_dirs: dict[str, str]) -> None:
    """Context ranks with packs of their own, and replay: the balance loss too is as on data ranks."""
    model, results = "qwen3-moe", []
    for parallel, budget in (({}, 96), ({"context_parallel_size": 2, "context_split_from": 41}, 192)):
        arguments = (model_dirs[model], make_steps(model), ROUTER[model], "off", budget)
        results.append(world(2).run(router_ranks.train_routed, *arguments, parallel=parallel)[0])
    assert results[0]["log"][0]["router_aux_loss"] > 1
    assert_same(*results)


def test_replay_with_shared_prefixes_equals_flat_packing(model_dirs: dict[str, str]) -> None:
    """Counts of choices differ, a shared prompt being computed once; all else is the same."""
    results = []
    for share in ("off", "auto"):
        arguments = (model_dirs["qwen3-moe"], make_steps("qwen3-moe", groups=True), {}, share)
        [result] = world(1).run(router_ranks.train_routed, *arguments)
        for values in result["log"]:
            del values["expert_load_max"], values["router_replay_rerouted"]
        results.append(result)
    assert_same(*results)


@pytest.mark.parametrize("model", ["qwen3-moe", "qwen3-moe-mixed-tied"])
def test_balance_loss_and_its_gradient_are_hfs(model_dirs: dict[str, str], model: str) -> None:
    """Per layer, averaged: Hugging Face's function on each layer's router logits."""
    coef, (layers, experts, top_k) = 0.5, SIZES[model]
    sequence = ranks.make_sequences(0)[0]
    [(metrics, grads)] = world(1).run(router_ranks.balanced_gradients, model_dirs[model], sequence, coef)
    hf = make_model(model)
    ids, mask = torch.tensor(sequence.token_ids).long(), torch.tensor(sequence.loss_mask[1:]).bool()
    out = hf(ids[None], output_router_logits=True)
    balance = [load_balancing_loss_func((logits,), experts, top_k) for logits in out.router_logits]
    assert len(balance) == layers
    aux = sum(balance) / layers
    (F.cross_entropy(out.logits[0, :-1][mask], ids[1:][mask]) + coef * aux).backward()
    assert metrics["router_aux_loss"] == pytest.approx(float(aux), rel=1e-5)
    for name, param in hf.named_parameters():
        if name in grads:  # Hugging Face stacks experts
            assert param.grad is not None
            assert np.abs(grads[name] - param.grad.numpy()).max() < 2e-6, name


def test_the_bias_moves_towards_equal_loads(model_dirs: dict[str, str]) -> None:
    """Against choices counted in Hugging Face's router; no other router has a bias."""
    sequences, rate = ranks.make_sequences(0), 0.03
    arguments = (model_dirs["deepseek-v3"], [sequences], {"bias_update_rate": rate})
    [result] = world(1).run(router_ranks.train_routed, *arguments)
    hf = make_model("deepseek-v3")
    [gate] = [m for name, m in hf.named_modules() if name.endswith("mlp.gate")]
    chosen: list[torch.Tensor] = []
    gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2].flatten()))
    with torch.no_grad():
        for sequence in sequences:
            hf(torch.tensor(sequence.token_ids)[None])
    load = torch.cat(chosen).bincount(minlength=8).double()
    before = gate.e_score_correction_bias
    after = result["weights"]["model.layers.1.mlp.gate.e_score_correction_bias"]
    moved = torch.from_numpy(after) - before
    assert torch.allclose(moved, rate * (load.mean() - load).sign().float(), atol=1e-6)
    assert result["log"][0]["expert_load_max"] == pytest.approx(float(load.max() / load.mean()))
