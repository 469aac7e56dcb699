"""Proximal policy optimisation with a critic (PPO: Schulman et al. 2017, arXiv:1707.06347).

After the rollout, a step runs::

    graded samples (rank 0) -> each rank's microbatches -> values, [old, reference logprobs] -> GAE (rank 0)
        -> critic and policy, alternating

With r_t the token's reward (a turn's reward at its last token, minus kl_reward_coef (old - ref) at each), V
the critic and rho the ratio of the token's probability to that before the step::

    A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,  R_t = A_t + V_t
    policy: max(-A rho, -A clamp(rho, 1 - c_low, 1 + c_high))      critic: losses/value.py

A is normalised over the batch. All values are gathered on rank 0, so A is independent of the layout.
"""

from __future__ import annotations

import numpy as np
import torch

from megarl.advantages.token_level import token_advantages, turn_rewards
from megarl.algorithms.critic import ActorCritic, make_critic
from megarl.cluster.collectives import from_first_rank
from megarl.config.ppo import PpoConfig
from megarl.loops import minibatches
from megarl.loops.minibatches import MiniBatch
from megarl.loops.online import Learned, run_online
from megarl.losses.policy import PolicyLoss
from megarl.losses.value import ValueLoss
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import NON_FINITE_WEIGHTS, Group, PackedBatch
from megarl.runs.training_run import TrainingRun
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import fill_values, score_step
from megarl.weights.hf import has_score


def run_ppo(config: PpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(
        config, "ppo", lambda _, run, policy: PpoLearner(config, run, policy, make_critic(config, policy))
    )


class PpoLearner:
    """Implements :class:`megarl.loops.online.Learner`."""

    def __init__(self, config: PpoConfig, run: TrainingRun, policy: Trainer, critic: Trainer) -> None:
        self.config, self.run, self.policy, self.critic = config, run, policy, critic
        self.algorithm = algorithm = config.algorithm
        self.trained = ActorCritic(policy, critic)
        options = PolicyLossOptions(
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
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
        minis, _ = minibatches.make(groups, algorithm.num_optimizer_steps_per_batch)
        values = minibatches.pack(policy, minis, algorithm.loss_aggregation)
        with self.run.timers("logprobs"):
            for mini in minis:
                fill_values(self.critic, mini.batches)
        # Without an optimizer step, nothing else measures the mismatch of engine and trainer.
        old = algorithm.needs_old_logprobs or not trains_policy
        minibatches.trace_first(minis, self.config.logging.samples_per_step, old)
        mismatch = minibatches.old_and_reference(policy, minis, self.config, self.run, old)
        values |= self.give_advantages(minis)
        results, critic = [], []
        for mini in minibatches.epochs(self.run, minis, algorithm.num_epochs_per_batch):
            critic.append(score_step(self.critic, mini.batches, self.value_loss, "targets"))
            if trains_policy:
                results.append(minibatches.policy_step(policy, mini, self.loss, self.config))
        if results and not old:
            mismatch = results[0].mismatch
        renamed = {name: f"critic_{name}" for name in ("grad_norm", "lr", NON_FINITE_WEIGHTS)}
        values |= minibatches.mean_metrics([result.metrics for result in results])
        values |= {renamed.get(name, name): value for name, value in minibatches.mean_metrics(critic).items()}
        values |= minibatches.split_metrics(minis)
        values |= minibatches.train_speed(self.run, values, algorithm)
        return Learned(values, mismatch, minibatches.traced(policy, minis))

    def give_advantages(self, minis: list[MiniBatch]) -> dict[str, float]:
        """Set advantages and returns on every microbatch, and the mean advantage on each sample."""
        asked = self.algorithm.needs_reference
        kl = minibatches.gather(minis, minibatches.kl_to_reference) if asked else None
        values = minibatches.gather(minis, _old_values)
        returns = [np.zeros(0)] * len(minis)

        def give() -> dict[str, float]:
            algorithm, offsets = self.algorithm, minibatches.token_offsets(minis)
            targets = np.concatenate([mini.targets() for mini in minis])
            found = token_advantages(
                *turn_rewards([sample for mini in minis for sample in mini.samples], offsets),
                values,
                targets,
                offsets,
                gamma=algorithm.gamma,
                gae_lambda=algorithm.gae_lambda,
                normalize=algorithm.normalize_advantages,
                kl=kl,
                kl_coef=algorithm.kl_reward_coef,
            )
            minibatches.set_advantages(minis, found.advantages)
            returns[:] = np.split(found.returns, np.cumsum([mini.batch.num_tokens for mini in minis])[:-1])
            metrics = {"return_mean": float(found.returns[targets].mean())}
            if found.explained_variance is not None:
                metrics["explained_variance"] = found.explained_variance
            return metrics if kl is None else metrics | {"kl_reward": float(kl[targets].mean())}

        metrics: dict[str, float] = from_first_rank(give)
        minibatches.scatter(minis, "advantages", [mini.known_advantages for mini in minis])
        minibatches.scatter(minis, "returns", returns)
        return metrics


def _old_values(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_values is not None
    return batch.old_values
