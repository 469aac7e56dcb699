"""Rules of `megarl ppo`, `megarl distill` and `megarl rm`: options without effect or that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.load import load_config
from megarl.config.ppo import PpoConfig
from megarl.errors import UserError
from megarl.jobs import JOBS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(kind: str, *overrides: str) -> Any:
    return load_config(JOBS[kind].root(), CONFIGS / f"quickstart_{kind}.yaml", overrides, check_files=False)


BROKEN = [
    ("ppo", ["algorithm.clip_low=1"], "algorithm.clip_low: must be below 1"),
    ("ppo", ["algorithm.dual_clip=3"], "algorithm.dual_clip: has no effect"),
    (
        "ppo",
        ["critic.warmup_steps=50"],
        "critic.warmup_steps: the policy trains in none of the run's 50 steps",
    ),
    ("ppo", ["critic.optimizer.min_lr=1"], "critic.optimizer.min_lr: must not exceed"),
    (
        "ppo",
        ["rollout.top_p=0.9", "algorithm.num_epochs_per_batch=2"],
        "rollout.top_p: logprobs are normalised",
    ),
    ("ppo", ["rollout.top_k=9", "algorithm.kl_reward_coef=0.1"], "rollout.top_k: logprobs are normalised"),
    ("ppo", ["rollout.max_staleness=1"], "rollout.max_staleness: not for ppo"),
    ("ppo", ["checkpoint.async_save=true"], "checkpoint.async_save: not for ppo"),
    ("ppo", ["rollout.num_prompts_per_step=5000"], "rollout.num_prompts_per_step: more than"),
    ("ppo", ["algorithm.kl_coef=0.1"], "algorithm.kl_coef: unknown key"),
    ("distill", ["algorithm.beta=0.3"], "algorithm.beta: algorithm.divergence = reverse does not read it"),
    (
        "distill",
        ["algorithm.teacher_top_k=8"],
        "algorithm.teacher_top_k: algorithm.divergence = reverse needs",
    ),
    ("distill", ["algorithm.renormalize_top_k=false"], "algorithm.renormalize_top_k: has no effect"),
    ("distill", ["rollout.max_staleness=1"], "rollout.max_staleness: not for distill"),
    ("rm", ["training.batch_size=3001"], "training.batch_size: larger than the training set"),
    (
        "rm",
        ["packing.max_tokens_per_microbatch=200"],
        "packing.max_sequence_length: both responses of a pair",
    ),
    ("rm", ["data.held_out=null"], "training.validation_interval: needs data.held_out"),
]


@pytest.mark.parametrize(("kind", "overrides", "line"), BROKEN, ids=lambda value: str(value)[:40])
def test_refused(kind: str, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(kind, *overrides)
    assert any(text.startswith(line) for text in str(caught.value).splitlines()), str(caught.value)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("ppo", ["rollout.num_generations_per_prompt=1"]),
        ("ppo", ["critic.optimizer=null", "critic.value_clip=null"]),
        ("ppo", ["rollout.top_p=0.9"]),
        ("distill", ["algorithm.divergence=jensen_shannon", "algorithm.beta=0.3"]),
        (
            "distill",
            ["algorithm.divergence=forward", "algorithm.teacher_top_k=8", "algorithm.renormalize_top_k=true"],
        ),
        ("rm", ["algorithm.center_coef=0.01"]),
    ],
)
def test_accepted(kind: str, overrides: list[str]) -> None:
    load(kind, *overrides)


def test_the_policy_has_no_steps_in_the_warm_up() -> None:
    config = load("ppo", "critic.warmup_steps=10", "algorithm.num_epochs_per_batch=3")
    assert isinstance(config, PpoConfig)
    assert config.num_optimizer_steps == 40 * 3
