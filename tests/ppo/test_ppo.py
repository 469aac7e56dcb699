"""PPO against a loop in plain torch and transformers, and every layout against one rank."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megarl.losses.base import LossTokens
from megarl.losses.score_inputs import ScoreTokens
from megarl.losses.value import ValueLoss
from megarl.records import Sample
from tests.algorithms.learner_ranks import fake_run, make_groups
from tests.models.tiny import save_model
from tests.ppo import ranks
from tests.trainer.world import world

ALGORITHM: dict[str, Any] = {
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "kl_reward_coef": 0.2,
    "clip_low": 0.05,
    "clip_high": 0.1,
    "num_optimizer_steps_per_batch": 2,
    "num_epochs_per_batch": 2,
}
VALUE_CLIP = 0.1
TEMPERATURE = 0.8
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "cp2-whole": {"context_parallel_size": 2, "context_split_from": 12},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model, and another body with a head of its own for the critic."""
    folder: Path = tmp_path_factory.mktemp("ppo-models")
    save_model("qwen3-tied", folder / "policy")
    base = save_model("qwen3-tied", folder / "other", seed=4)
    config = transformers.Qwen3Config.from_pretrained(folder / "other", num_labels=1)
    critic = transformers.Qwen3ForSequenceClassification(config)
    critic.model.load_state_dict(base.model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        critic.score.weight.normal_(0, 0.02)
    critic.save_pretrained(folder / "critic")
    return {"policy": str(folder / "policy"), "critic": str(folder / "critic")}


@functools.cache
def one_rank(model_dir: str, critic_dir: str) -> dict[str, Any]:
    critic = {"path": critic_dir, "value_clip": VALUE_CLIP}
    [result] = world(1).run(ranks.learn, model_dir, critic, ALGORITHM)
    return dict(result)


# --- plain torch ------------------------------------------------------------------------------


def logprobs_of(model: Any, sample: Sample) -> torch.Tensor:
    ids = [*sample.prompt_ids, *sample.response_ids]
    logits = model(torch.tensor([ids])).logits[0] / TEMPERATURE
    rows = torch.arange(len(sample.prompt_ids) - 1, len(ids) - 1)
    return logits[rows].log_softmax(-1).gather(1, torch.tensor(sample.response_ids).long()[:, None])[:, 0]


def values_of(model: Any, sample: Sample) -> torch.Tensor:
    ids = [*sample.prompt_ids, *sample.response_ids]
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    return model.score(hidden)[len(sample.prompt_ids) - 1 : len(ids) - 1, 0]


def plain_advantages(
    samples: list[Sample], values: list[torch.Tensor], kls: list[torch.Tensor], *, normalize: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    gamma, lam = ALGORITHM["gamma"], ALGORITHM["gae_lambda"]
    advantages, returns = [], []
    for sample, value, kl in zip(samples, values, kls, strict=True):
        rewards = -ALGORITHM["kl_reward_coef"] * kl
        rewards[-1] += sample.reward
        own, later, next_value = torch.zeros_like(value), 0.0, 0.0
        for t in reversed(range(len(value))):
            later = rewards[t] + gamma * next_value - value[t] + gamma * lam * later
            own[t], next_value = later, value[t]
        advantages.append(own)
        returns.append(own + value)
    if not normalize:
        return advantages, returns
    flat = torch.cat(advantages)
    mean, std = flat.mean(), flat.std(correction=0)
    return [(a - mean) / (std + 1e-8) for a in advantages], returns


def step(model: Any, optimizer: Any, loss: torch.Tensor, bound: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
    optimizer.step()


def plain_ppo(policy_dir: str, critic_dir: str) -> tuple[Any, Any, list[float]]:
    """The same STEPS in float64, sequence by sequence, with torch's AdamW."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(policy_dir, dtype=torch.float64).eval() for _ in range(2))
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(critic_dir, dtype=torch.float64)
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-3}
    of_policy = torch.optim.AdamW(policy.parameters(), lr=ranks.OPTIMIZER["lr"], **adam)
    of_critic = torch.optim.AdamW(critic.parameters(), lr=ranks.CRITIC_OPTIMIZER["lr"], **adam)
    low, high = ALGORITHM["clip_low"], ALGORITHM["clip_high"]
    value_losses: list[float] = []
    for number in range(1, ranks.STEPS + 1):
        groups = make_groups(number)
        samples = [s for group in groups for s in group.samples]
        with torch.no_grad():
            old = [logprobs_of(policy, s) for s in samples]
            kls = [o - logprobs_of(reference, s) for o, s in zip(old, samples, strict=True)]
            before = [values_of(critic, s) for s in samples]
        advantages, returns = plain_advantages(samples, before, kls)
        value_losses.append(0.0)
        for half in [range(8), range(8, 16)] * 2:
            count = sum(len(samples[i].response_ids) for i in half)
            total = torch.zeros((), dtype=torch.float64)
            for i in half:
                value = values_of(critic, samples[i])
                near = before[i] + (value - before[i]).clamp(-VALUE_CLIP, VALUE_CLIP)
                errors = torch.maximum((value - returns[i]) ** 2, (near - returns[i]) ** 2)
                total = total + 0.5 * errors.sum() / count
            value_losses[-1] += float(total.detach()) / 4
            step(critic, of_critic, total, 3.0)
            total = torch.zeros((), dtype=torch.float64)
            for i in half:
                ratio = (logprobs_of(policy, samples[i]) - old[i]).exp()
                surrogate = torch.minimum(
                    ratio * advantages[i], ratio.clamp(1 - low, 1 + high) * advantages[i]
                )
                total = total - surrogate.sum() / count
            step(policy, of_policy, total, 1.0)
    return policy, critic, value_losses


def test_equals_plain_torch(models: dict[str, str]) -> None:
    """Two steps of two epochs over two minibatches each: clipping, KL in the reward, both optimizers."""
    found = one_rank(models["policy"], models["critic"])
    policy, critic, value_losses = plain_ppo(models["policy"], models["critic"])
    assert [line["value_loss"] for line in found["log"]] == pytest.approx(value_losses, rel=1e-4)
    assert found["log"][0]["kl_reward"] == 0 and abs(found["log"][1]["kl_reward"]) > 0.01
    assert min(line["clip_fraction"] for line in found["log"]) > 0.05, "or clipping was not tested"
    assert min(line["value_clip_fraction"] for line in found["log"]) > 0.05
    for name, model in (("policy", policy), ("critic", critic)):
        theirs = {n: p.detach().float().numpy() for n, p in model.named_parameters()}
        worst, moved = hf_difference(found[name], theirs, models[name])
        assert moved > 0.01, "training changed the weights"
        assert worst < 2e-4, name


def hf_difference(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], start: str
) -> tuple[float, float]:
    """Largest difference of any weight, and how far theirs is from where it began."""
    from safetensors.numpy import load_file

    began = load_file(Path(start) / "model.safetensors")
    assert set(ours) == set(theirs)
    worst = max(float(np.abs(ours[n] - theirs[n]).max()) for n in theirs)
    return worst, max(float(np.abs(theirs[n] - began[n]).max()) for n in theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(models: dict[str, str], layout: str) -> None:
    expected = one_rank(models["policy"], models["critic"])
    critic = {"path": models["critic"], "value_clip": VALUE_CLIP}
    results = world(2).run(ranks.learn, models["policy"], critic, ALGORITHM, parallel=LAYOUTS[layout])
    found = results[0]
    assert results[1]["log"] == found["log"]
    assert results[1]["advantages"] == [[]] * ranks.STEPS, "samples are rank 0's alone"
    for one, two in zip(expected["log"], found["log"], strict=True):
        for key in [key for key in two if key.endswith(("num_split_sequences", "num_whole_sequences"))]:
            assert two.pop(key) > 0 and LAYOUTS[layout].get("context_split_from")
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key not in ("num_microbatches", "num_computed_tokens"):
                assert two[key] == pytest.approx(value, rel=3e-4, abs=1e-4), key
    for ours, theirs in zip(found["advantages"], expected["advantages"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    for name in ("policy", "critic"):
        for key, value in expected[name].items():
            assert np.abs(found[name][key] - value).max() < 2e-4, key


def test_warmup_trains_the_critic_alone(models: dict[str, str]) -> None:
    algorithm = ALGORITHM | {
        "kl_reward_coef": 0.0,
        "num_optimizer_steps_per_batch": 1,
        "num_epochs_per_batch": 1,
    }
    [result] = world(1).run(ranks.learn, models["policy"], {"warmup_steps": ranks.STEPS}, algorithm)
    assert all((result["policy"][n] == w).all() for n, w in result["start"].items())
    assert "score.weight" in result["critic"] and "a new value head" in result["notes"][0]
    assert all("policy_loss" not in line and line["value_loss"] > 0 for line in result["log"])
    assert all(line["logprob_abs_diff_max"] > 0 for line in result["log"]), "engine and trainer are compared"
    embedding = "model.embed_tokens.weight"
    assert np.abs(result["critic"][embedding] - result["start"][embedding]).max() > 1e-4


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_checkpoints_hold_both(models: dict[str, str], tmp_path: Path, layout: str) -> None:
    directory = str(tmp_path / "checkpoint")
    arguments = (models["policy"], ALGORITHM, directory)
    policy, critic, policy_again, critic_again = world(2).run(
        ranks.save_and_load, *arguments, parallel=LAYOUTS[layout]
    )[0]
    for one, two in ((policy, policy_again), (critic, critic_again)):
        assert all((two[name] == weight).all() for name, weight in one.items())


def test_value_loss_in_float64() -> None:
    torch.manual_seed(0)
    values, old, returns = (torch.randn(40, dtype=torch.float64) for _ in range(3))
    weights = torch.rand(40, dtype=torch.float64)
    values.requires_grad_()
    tokens = ScoreTokens(values, weights, old, returns, torch.arange(40), 40, torch.arange(40), cp_group=None)
    result = ValueLoss(0.3)(tokens)
    result.loss.backward()
    expected, gradient, clipped = 0.0, [], 0
    for v, o, r, w in zip(values.tolist(), old.tolist(), returns.tolist(), weights.tolist(), strict=True):
        near = min(max(v, o - 0.3), o + 0.3)
        take_near = (near - r) ** 2 > (v - r) ** 2
        clipped += take_near
        expected += 0.5 * w * max((v - r) ** 2, (near - r) ** 2)
        gradient.append(0.0 if take_near else w * (v - r))
    assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-12)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(gradient, abs=1e-12)
    assert float(result.token_sums["value_clip_fraction"]) == clipped > 0
    plain = ValueLoss(None)(tokens)
    assert float(plain.loss.detach()) == pytest.approx(
        float((0.5 * weights * (values - returns) ** 2).sum().detach()), abs=1e-12
    )


@pytest.mark.parametrize(("normalize", "aggregation"), [(True, "sequence"), (False, "token")])
def test_advantages_and_means_are_those_asked_for(
    models: dict[str, str], normalize: bool, aggregation: str
) -> None:
    """Of one optimizer step: before it the policy is the reference, and the critic as it was loaded."""
    one_step = {"num_optimizer_steps_per_batch": 1, "num_epochs_per_batch": 1}
    algorithm = ALGORITHM | one_step | {"normalize_advantages": normalize, "loss_aggregation": aggregation}
    critic_settings = {"path": models["critic"], "value_clip": None}
    [found] = world(1).run(ranks.learn, models["policy"], critic_settings, algorithm)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    critic = load(models["critic"], dtype=torch.float64)
    samples = [sample for group in make_groups(1) for sample in group.samples]
    with torch.no_grad():
        values = [values_of(critic, sample) for sample in samples]
    no_kl = [torch.zeros_like(value) for value in values]
    advantages, returns = plain_advantages(samples, values, no_kl, normalize=normalize)
    means = [float(each.mean()) for each in advantages]
    assert found["advantages"][0] == pytest.approx(means, abs=1e-4)
    errors = [0.5 * (value - each) ** 2 for value, each in zip(values, returns, strict=True)]
    by_sequence = torch.stack([each.mean() for each in errors]).mean()
    expected = by_sequence if aggregation == "sequence" else torch.cat(errors).mean()
    assert found["log"][0]["value_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert float(by_sequence) != pytest.approx(float(torch.cat(errors).mean()), rel=1e-3)


@pytest.mark.parametrize(("dual_clip", "entropy_coef"), [(None, 0.0), (3.0, 0.0), (None, 0.5)])
def test_a_learners_loss_by_hand(dual_clip: float | None, entropy_coef: float) -> None:
    """Advantages -1, -2 and 1 with the ratios 8, 2 and 4: only the first reaches the dual clip."""
    from megarl.algorithms.ppo import PpoLearner

    algorithm = ALGORITHM | {"dual_clip": dual_clip, "entropy_coef": entropy_coef}
    config = ranks.make_config("unused", {}, algorithm, 1)
    learner = PpoLearner(config, fake_run(), None, None)  # type: ignore[arg-type]
    tokens = LossTokens(
        logprobs=torch.tensor([8.0, 2.0, 4.0]).log() - 3.0,
        entropy=torch.tensor([1.0, 2.0, 3.0]),
        weights=torch.tensor([0.2, 0.3, 0.5]),
        labels=torch.tensor([1, 2, 3]),
        sequence_ids=torch.tensor([0, 0, 0]),
        advantages=torch.tensor([-1.0, -2.0, 1.0]),
        old_logprobs=torch.full((3,), -3.0),
        ref_logprobs=None,
        rollout_logprobs=None,
    )
    clipped = 1 + ALGORITHM["clip_high"]  # of the gain, 4 before
    expected = 0.2 * (8 if dual_clip is None else 3) + 0.3 * 2 * 2 - 0.5 * clipped
    expected -= entropy_coef * (0.2 * 1 + 0.3 * 2 + 0.5 * 3)
    assert float(learner.loss(tokens).loss) == pytest.approx(expected, rel=1e-5)
