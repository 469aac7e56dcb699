"""Proximal policy optimisation with a critic (PPO: Schulman et al. 2017, arXiv:1707.06347).

What follows the rollout in a step::

    graded samples (rank 0) -> each rank's microbatches -> values, [old, reference logprobs] -> GAE (rank 0)
        -> critic and policy, alternating

With r_t the token's reward (each turn's with its last token, less kl_reward_coef (old - ref) of each), V
the critic and rho the ratio of the token's probability to what it was before the step::

    A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,  R_t = A_t + V_t
    policy: max(-A rho, -A clamp(rho, 1 - c_low, 1 + c_high))      critic: losses/value.py

A is normalised over the batch. All values are gathered on rank 0, so that A depends on no layout.
"""

from __future__ import annotations

import numpy as np
import torch

from megarl.advantages.token_level import token_advantages, turn_rewards
from megarl.algorithms import parts as steps
from megarl.algorithms.critic import ActorCritic, make_critic
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.parts import Part
from megarl.algorithms.run import Run
from megarl.config.ppo import PpoConfig
from megarl.losses.policy import PolicyLoss
from megarl.losses.value import ValueLoss
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import NON_FINITE_WEIGHTS, Group, PackedBatch
from megarl.trainer.control import from_first_rank
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import fill_values, score_step
from megarl.weights.hf import has_score


def run_ppo(config: PpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(
        config, "ppo", lambda _, run, policy: PpoLearner(config, run, policy, make_critic(config, policy))
    )


class PpoLearner:
    """Implements :class:`megarl.algorithms.online.Learner`."""

    def __init__(self, config: PpoConfig, run: Run, policy: Trainer, critic: Trainer) -> None:
        self.config, self.run, self.policy, self.critic = config, run, policy, critic
        self.algorithm = algorithm = config.algorithm
        self.trained = ActorCritic(policy, critic)
        options = PolicyLossOptions(
            clip_low=algorithm.clip_ratio_low,
            clip_high=algorithm.clip_ratio_high,
            dual_clip=algorithm.clip_ratio_c,
            entropy_coef=algorithm.entropy_coef,
        )
        self.loss = PolicyLoss(options, config.debug.check_numerics)
        self.value_loss = ValueLoss(config.critic.value_clip)

    def notes(self) -> list[str]:
        """See Learner."""
        path = self.config.critic.path or self.config.model.path
        head = "its own score head" if has_score(path) else "a new value head"
        warmup = self.config.critic.warmup_steps
        return [
            f"critic: {path} with {head}; the first {warmup} steps train it alone",
            *self.config.describe_algorithm(),
        ]

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner."""
        algorithm, policy = self.algorithm, self.policy
        trains_policy = step > self.config.critic.warmup_steps
        parts, _ = steps.make_parts(groups, algorithm.num_optimizer_steps_per_batch)
        values = steps.pack_parts(policy, parts, algorithm.loss_aggregation)
        with self.run.timers("logprobs"):
            for part in parts:
                fill_values(self.critic, part.batches)
        # Without an optimizer step nothing else compares engine and trainer.
        old = algorithm.needs_old_logprobs or not trains_policy
        agreement = steps.old_and_reference(policy, parts, self.config, self.run, old)
        values |= self.give_advantages(parts)
        results, critic = [], []
        for part in steps.passes(self.run, parts, algorithm.num_epochs_per_batch):
            critic.append(score_step(self.critic, part.batches, self.value_loss, "targets"))
            if trains_policy:
                results.append(steps.policy_step(policy, part, self.loss, self.config))
        if results and not old:
            agreement = results[0].agreement
        renamed = {name: f"critic_{name}" for name in ("grad_norm", "lr", NON_FINITE_WEIGHTS)}
        values |= steps.mean_metrics([result.metrics for result in results])
        values |= {renamed.get(name, name): value for name, value in steps.mean_metrics(critic).items()}
        values |= steps.placed(parts)
        return Learned(values | steps.train_speed(self.run, values, algorithm), agreement)

    def give_advantages(self, parts: list[Part]) -> dict[str, float]:
        """Advantages and returns to every microbatch, and their mean to each sample."""
        asked = self.algorithm.needs_reference
        kl = steps.gather_parts(parts, steps.kl_to_reference) if asked else None
        values = steps.gather_parts(parts, _old_values)
        returns = [np.zeros(0)] * len(parts)

        def give() -> dict[str, float]:
            algorithm, offsets = self.algorithm, steps.token_offsets(parts)
            targets = np.concatenate([part.targets() for part in parts])
            found = token_advantages(
                *turn_rewards([sample for part in parts for sample in part.samples], offsets),
                values,
                targets,
                offsets,
                gamma=algorithm.gamma,
                gae_lambda=algorithm.gae_lambda,
                normalize=algorithm.normalize_advantages,
                kl=kl,
                kl_coef=algorithm.kl_reward_coef,
            )
            steps.set_advantages(parts, found.advantages)
            returns[:] = np.split(found.returns, np.cumsum([part.batch.num_tokens for part in parts])[:-1])
            told = {"return_mean": float(found.returns[targets].mean())}
            if found.explained_variance is not None:
                told["explained_variance"] = found.explained_variance
            return told if kl is None else told | {"kl_reward": float(kl[targets].mean())}

        told: dict[str, float] = from_first_rank(give)
        steps.scatter_parts(parts, "advantages", [part.known_advantages for part in parts])
        steps.scatter_parts(parts, "returns", returns)
        return told


def _old_values(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_values is not None
    return batch.old_values
