"""Distillation against plain torch in float64, and every layout against one rank."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megarl.records import TokenSequence
from tests.algorithms.learner_ranks import make_groups
from tests.distill import ranks
from tests.models.tiny import save_model
from tests.trainer.ranks import make_sequences
from tests.trainer.world import world

OPTIONS: dict[str, dict[str, Any]] = {
    "forward": {"divergence": "forward", "temperature": 0.8},
    "reverse": {"divergence": "reverse", "temperature": 1.0},
    "jensen_shannon": {"divergence": "jensen_shannon", "temperature": 1.3, "beta": 0.3},
    "top_k": {"divergence": "forward", "temperature": 0.8, "top_k": 7, "renormalize": True},
    "top_k_bare": {"divergence": "forward", "temperature": 1.0, "top_k": 300, "renormalize": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
CASES = [("reverse", layout) for layout in LAYOUTS] + [
    ("jensen_shannon", "tp2"),
    ("jensen_shannon", "pp2"),
    ("top_k", "tp2"),
    ("top_k_bare", "tp2"),
]
STEPS = 2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tied student, and a teacher of another family and depth with the same vocabulary."""
    folder: Path = tmp_path_factory.mktemp("distill-models")
    save_model("qwen3-tied", folder / "student")
    save_model("llama-deep-tied", folder / "teacher", seed=9)
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher")}


def divergence(options: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """From logits [N, V] float64, by the definitions."""
    p = (student / options["temperature"]).softmax(-1)
    q = (teacher / options["temperature"]).softmax(-1)
    if "top_k" in options:
        top = q.topk(min(options["top_k"], q.shape[1]))
        weights = top.values / (top.values.sum(-1, keepdim=True) if options["renormalize"] else 1.0)
        return (weights * (weights / p.gather(1, top.indices)).log()).sum(-1)
    if options["divergence"] == "forward":
        return (q * (q / p).log()).sum(-1)
    if options["divergence"] == "reverse":
        return (p * (p / q).log()).sum(-1)
    beta = options["beta"]
    mixed = (1 - beta) * p + beta * q
    return (1 - beta) * (p * (p / mixed).log()).sum(-1) + beta * (q * (q / mixed).log()).sum(-1)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_equal_float64(models: dict[str, str], name: str) -> None:
    sequences, options = make_sequences(3), OPTIONS[name]
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = (load(models[n], dtype=torch.float64).eval() for n in ("student", "teacher"))
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        rows = [t - 1 for t in range(1, len(sequence.token_ids)) if sequence.loss_mask[t]]
        if rows:
            with torch.no_grad():
                target = teacher(ids).logits[0, rows]
            total = total + divergence(options, student(ids).logits[0, rows], target).sum()
    expected = total / sum(sum(s.loss_mask[1:]) for s in sequences)
    expected.backward()
    [(loss, grads)] = world(1).run(ranks.gradients, models["student"], models["teacher"], options, sequences)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert set(theirs) == set(grads)
    for key, grad in theirs.items():
        assert np.abs(grads[key] - grad.float().numpy()).max() < 1e-5, key


@functools.cache
def one_rank(student: str, teacher: str, name: str) -> dict[str, Any]:
    [result] = world(1).run(ranks.steps, student, teacher, OPTIONS[name], STEPS)
    assert min(line["grad_norm"] for line in result["log"]) > 0.01
    return dict(result)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layout_equals_one_rank(models: dict[str, str], name: str, layout: str) -> None:
    arguments = (models["student"], models["teacher"], OPTIONS[name], STEPS)
    expected = one_rank(models["student"], models["teacher"], name)
    results = world(2).run(ranks.steps, *arguments, parallel=LAYOUTS[layout])
    found = results[0]
    assert results[1]["log"] == found["log"]
    for one, two in zip(expected["log"], found["log"], strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for key, value in expected["weights"].items():
        assert np.abs(found["weights"][key] - value).max() < 1e-5, key
    for key, value in expected["teacher"].items():
        assert (found["teacher"][key] == value).all(), f"the teacher stays as it is: {key}"


TORCH: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "fsdp2": (2, {}, {}),
    "tp2-sequence-parallel": (2, LAYOUTS["tp2-sequence-parallel"], {}),
    "offloaded": (2, {}, {"cpu_offload": True}),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) == ("reverse", "fsdp2") else pytest.mark.slow)
        for name in ("reverse", "top_k")
        for layout in TORCH
    ],
)
def test_the_torch_backend_equals_the_other(models: dict[str, str], name: str, layout: str) -> None:
    size, parallel, trainer = TORCH[layout]
    arguments = (models["student"], models["teacher"], OPTIONS[name], STEPS, trainer | {"backend": "torch"})
    expected = one_rank(models["student"], models["teacher"], name)
    results = world(size).run(ranks.steps, *arguments, parallel=parallel)
    assert all(found["log"] == results[0]["log"] for found in results)
    for one, two in zip(expected["log"], results[0]["log"], strict=True):
        for key in one.keys() & two.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
    for part in ("weights", "teacher"):
        for key, value in expected[part].items():
            assert np.abs(results[0][part][key] - value).max() < 1e-5, key


def test_top_k_of_the_teacher_over_shards(models: dict[str, str]) -> None:
    """Two tensor ranks find the ids that one finds; k beyond the vocabulary takes all of it."""
    arguments = (models["teacher"], make_sequences(3))
    for k, kept in ((5, 5), (300, 250)):
        [whole] = world(1).run(ranks.teacher_top_k, *arguments, k, 0.8)
        split = world(2).run(ranks.teacher_top_k, *arguments, k, 0.8, parallel={"tensor_parallel_size": 2})
        assert split[0] == split[1]
        for (ids, logprobs), (other_ids, other_logprobs) in zip(whole, split[0], strict=True):
            assert len(ids) and all(len(row) == kept for row in ids)
            if k == 5:
                assert ids == other_ids
            assert np.abs(np.array(logprobs) - np.array(other_logprobs)).max() < 1e-5
            if k == 300:
                assert np.exp(np.array(logprobs)).sum(-1) == pytest.approx(1.0, abs=1e-5)


def sampled(model_dir: str, temperature: float, top_k: int, top_p: float) -> list[TokenSequence]:
    """Two samples, each token the likeliest, with the logprobs that an engine says after truncation."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    sequences = []
    for prompt in ([5, 9, 11], [7, 3, 8, 20]):
        ids, logprobs = list(prompt), [0.0] * len(prompt)
        for _ in range(6):
            with torch.no_grad():
                p = (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
            order = p.argsort(descending=True)[: top_k or None]
            share = p[order] / p[order].sum()  # top_p counts among the top_k
            kept = order[share.cumsum(0) - share < top_p]
            ids.append(int(order[0]))
            logprobs.append(float((p[order[0]] / p[kept].sum()).log()))
        mask = [0] * len(prompt) + [1] * 6
        sequences.append(TokenSequence(np.array(ids), np.array(mask), np.array(logprobs)))
    return sequences


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.5), (3, 1.0), (20, 0.3)])
def test_truncated_samples_agree_with_the_trainer(models: dict[str, str], top_k: int, top_p: float) -> None:
    """The engine's logprobs are of the tokens it kept: compared with the whole vocabulary's they are off by
    the log of the share that was kept, and a run said that engine and trainer were not the same policy."""
    drawn_by = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    sequences = sampled(models["student"], **drawn_by)
    arguments = (models["student"], models["teacher"], {"temperature": 0.8})
    [found] = world(1).run(ranks.mismatch, *arguments, drawn_by, sequences)
    assert found["logprob_abs_diff_max"] < 2e-5
    [found] = world(1).run(ranks.filled, models["student"], drawn_by, sequences)
    assert found["logprob_abs_diff_max"] < 2e-5


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"loss_aggregation": "token"}, OPTIONS["reverse"]),
        ({"loss_aggregation": "sequence"}, OPTIONS["reverse"]),
        (
            {"divergence": "forward", "teacher_top_k": 7, "renormalize_top_k": True},
            OPTIONS["top_k"] | {"temperature": 1.0},
        ),
        (
            {"divergence": "forward", "teacher_top_k": 7, "renormalize_top_k": False},
            OPTIONS["top_k"] | {"temperature": 1.0, "renormalize": False},
        ),
    ],
)
def test_a_learners_first_loss_in_float64(
    models: dict[str, str], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    [found] = world(1).run(ranks.learn, models["student"], models["teacher"], settings)
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = (load(models[n], dtype=torch.float64).eval() for n in ("student", "teacher"))
    each = []
    for sample in (sample for group in make_groups(1) for sample in group.samples):
        ids = torch.tensor([[*sample.prompt_ids.tolist(), *sample.response_ids.tolist()]])
        rows = slice(len(sample.prompt_ids) - 1, -1)
        with torch.no_grad():
            each.append(divergence(options, student(ids).logits[0, rows], teacher(ids).logits[0, rows]))
    by_sequence = torch.stack([values.mean() for values in each]).mean()
    expected = by_sequence if settings.get("loss_aggregation") == "sequence" else torch.cat(each).mean()
    assert found["losses"] == pytest.approx([float(expected)], abs=1e-5)
    assert float(by_sequence) != pytest.approx(float(torch.cat(each).mean()), abs=1e-4)


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_optimizer_steps_and_epochs(models: dict[str, str], steps: int, epochs: int) -> None:
    settings = {"num_optimizer_steps_per_batch": steps, "num_epochs_per_batch": epochs}
    [found] = world(1).run(ranks.learn, models["student"], models["teacher"], settings)
    lengths = [sum(len(s.response_ids) for s in group.samples) for group in make_groups(1)]
    parts = [sum(lengths)] if steps == 1 else [sum(lengths[:2]), sum(lengths[2:])]
    assert [sorted(found["targets"][i : i + steps]) for i in range(0, steps * epochs, steps)] == [
        sorted(parts)
    ] * epochs
    assert len(found["targets"]) == steps * epochs
    assert len(set(found["losses"])) == steps * epochs, "every one changes the student"
