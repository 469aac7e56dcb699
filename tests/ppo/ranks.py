"""A PPO learner on trainer ranks; Megatron is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.algorithms.learner_ranks import MAX_NEW_TOKENS, fake_run, make_groups
from tests.trainer.ranks import weights

STEPS = 2
OPTIMIZER = {"lr": 1e-2, "adam_eps": 1e-3}
CRITIC_OPTIMIZER = {"lr": 2e-2, "adam_eps": 1e-3, "max_grad_norm": 3.0}


def make_config(model_dir: str, critic: dict[str, Any], algorithm: dict[str, Any], num_processes: int) -> Any:
    from megarl.config.ppo import PpoConfig

    return PpoConfig.model_validate(
        {
            "run": {"dir": "unused", "seed": 3},
            "model": {"path": model_dir},
            "parallel": {"num_processes": num_processes},
            "data": {"train": {"source": "reasoning_gym", "task": "chain_sum"}},
            "rollout": {
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 4,
                "max_new_tokens": MAX_NEW_TOKENS,
                "temperature": 0.8,
            },
            "packing": {"max_tokens_per_microbatch": 64},
            "optimizer": OPTIMIZER,
            "algorithm": algorithm,
            "critic": {"optimizer": CRITIC_OPTIMIZER} | critic,
            "training": {"num_steps": 4},
        }
    )


def make_learner(context: Any, model_dir: str, critic: dict[str, Any], algorithm: dict[str, Any]) -> Any:
    from megarl.algorithms.ppo import PpoLearner, make_critic
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    config = make_config(model_dir, critic, algorithm, context.layout.world_size)
    policy = MegatronTrainer(
        context, load_architecture(model_dir), config.model, config.packing, config.optimizer, 8
    )
    policy.keep_reference()
    return PpoLearner(config, fake_run(), policy, make_critic(config, policy))


def learn(context: Any, model_dir: str, critic: dict[str, Any], algorithm: dict[str, Any]) -> dict[str, Any]:
    """Take STEPS steps; return metrics, the samples' advantages, both models' weights."""
    learner = make_learner(context, model_dir, critic, algorithm)
    log, advantages, start = [], [], weights(learner.policy)
    for step in range(1, STEPS + 1):
        groups = make_groups(step) if context.is_first else []  # no other rank has the samples
        learned = learner.learn(step, groups)
        told = dict(learned.metrics)
        told.pop("tokens_per_second_train")
        log.append(told | learned.mismatch.metrics())
        advantages.append([s.advantage for group in groups for s in group.samples])
    return {
        "log": log,
        "advantages": advantages,
        "start": start,
        "policy": weights(learner.policy),
        "critic": weights(learner.critic),
        "notes": learner.notes(),
    }


def save_and_load(
    context: Any, model_dir: str, algorithm: dict[str, Any], directory: str
) -> list[dict[str, np.ndarray]]:
    """Both models one step after a checkpoint: of the learner that wrote it and of one that read it."""
    from megarl.cluster.collectives import broadcast

    first = make_learner(context, model_dir, {}, algorithm)
    first.learn(1, make_groups(1))
    if context.is_first:
        Path(directory).mkdir()
    broadcast(None)
    first.trained.save(Path(directory), optimizer=True)
    second = make_learner(context, model_dir, {}, algorithm)
    assert second.trained.load(Path(directory))
    found = []
    for learner in (first, second):
        learner.learn(2, make_groups(2))
        found += [weights(learner.policy), weights(learner.critic)]
    return found
