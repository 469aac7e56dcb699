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

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.advantages.token_level import TokenAdvantages, token_advantages, turn_rewards
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.parts import Part, gather_parts, make_parts, pack_parts, placed
from megarl.algorithms.run import Run
from megarl.algorithms.updates import policy_step, train_speed
from megarl.config.model import ModelConfig
from megarl.config.ppo import PpoConfig
from megarl.errors import UserError
from megarl.losses.agreement import Agreement
from megarl.losses.policy import PolicyLoss
from megarl.losses.value import ValueLoss
from megarl.models import load_architecture
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import Group, PackedBatch
from megarl.trainer.batches import scatter_to_packed
from megarl.trainer.build import build_scorer
from megarl.trainer.control import broadcast, from_first_rank
from megarl.trainer.interface import PendingSave, Trained, Trainer
from megarl.trainer.passes import fill_logprobs, fill_values, score_step
from megarl.weights.hf import has_score


def run_ppo(config: PpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(
        config, "ppo", lambda _, run, policy: PpoLearner(config, run, policy, make_critic(config, policy))
    )


def make_critic(config: PpoConfig, policy: Trainer) -> Trainer:
    """The critic, beside ``policy`` and under its layout."""
    path = config.critic.path or config.model.path
    architecture = load_architecture(path)
    if architecture.spec.vocab_size != policy.architecture.spec.vocab_size:
        raise UserError(f"critic.path: {path} has another vocabulary than {config.model.path}")
    return build_scorer(
        config,
        policy.context,
        architecture,
        ModelConfig(path=path, dtype=config.model.dtype),
        config.critic.optimizer or config.optimizer,
        config.num_critic_steps,
    )


@dataclass(frozen=True, slots=True)
class ActorCritic(Trained):
    """Both models as one to checkpoints and to the memory they take turns in."""

    policy: Trainer
    critic: Trainer

    def save(self, directory: Path, *, optimizer: bool) -> None:
        """The critic's checkpoint lies in ``critic`` of the policy's."""
        self.policy.save(directory, optimizer=optimizer)
        if self.critic.context.is_first:
            (directory / "critic").mkdir()
        broadcast(None)  # nobody writes before it is there
        self.critic.save(directory / "critic", optimizer=optimizer)

    def start_save(self, directory: Path, *, optimizer: bool) -> PendingSave:
        """Not for two models (checkpoint.async_save is refused)."""
        raise NotImplementedError

    def sleep(self, parts: AnySequence[str]) -> None:
        """See Trained."""
        self.policy.sleep(parts)
        self.critic.sleep(parts)

    def wake(self) -> None:
        """See Trained."""
        self.policy.wake()
        self.critic.wake()

    def load(self, directory: Path) -> bool:
        """See Trained. The policy comes last: both files of random states hold the same."""
        critic, policy = self.critic.load(directory / "critic"), self.policy.load(directory)
        return critic and policy


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
        self.needs_reference, self.needs_old = algorithm.needs_reference, algorithm.needs_old_logprobs

    def notes(self) -> list[str]:
        """See Learner."""
        path = self.config.critic.path or self.config.model.path
        head = "its own score head" if has_score(path) else "a new value head"
        old = (
            "one forward pass per batch" if self.needs_old else "skipped (one optimizer step: old = current)"
        )
        reference = "one forward pass per batch" if self.needs_reference else "skipped (kl_reward_coef = 0)"
        return [
            f"critic: {path} with {head}; the first {self.config.critic.warmup_steps} steps train it alone",
            f"old logprobs: {old}; reference logprobs: {reference}",
        ]

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner."""
        trains_policy = step > self.config.critic.warmup_steps
        parts, _ = make_parts(groups, self.algorithm.num_optimizer_steps_per_batch)
        values = pack_parts(self.policy, parts, self.algorithm.loss_aggregation)
        # Without an optimizer step nothing else compares engine and trainer.
        agreement = self.fill_logprobs(parts, old=self.needs_old or not trains_policy)
        values |= self.give_advantages(parts)
        results, critic_results = self.train(parts, trains_policy)
        if results and not self.needs_old:
            agreement = results[0].agreement
        for found in ([r.metrics for r in results], critic_results):
            if found:
                values |= {name: sum(f[name] for f in found) / len(found) for name in found[0]}
        for name, found in (("lr", [r.metrics for r in results]), ("critic_lr", critic_results)):
            if found:
                values[name] = found[-1][name]
        values |= placed(parts)
        speed = train_speed(self.run, values["num_tokens"], self.algorithm.num_epochs_per_batch)
        return Learned(values | speed, agreement)

    def fill_logprobs(self, parts: list[Part], *, old: bool) -> Agreement:
        """Values, and the old and reference logprobs that are needed; engine against trainer."""
        temperature, agreement = self.config.rollout.temperature, Agreement()
        with self.run.timers("logprobs"):
            for part in parts:
                fill_values(self.critic, part.batches)
                if old:
                    agreement = agreement + fill_logprobs(
                        self.policy, part.batches, "old_logprobs", temperature=temperature
                    )
            if self.needs_reference:
                with self.policy.reference():
                    for part in parts:
                        fill_logprobs(self.policy, part.batches, "ref_logprobs", temperature=temperature)
        return agreement

    def give_advantages(self, parts: list[Part]) -> dict[str, float]:
        """Advantages and returns to every microbatch, and their mean to each sample."""
        kl = gather_parts(parts, _k1) if self.needs_reference else None
        values = gather_parts(parts, _old_values)
        returns: list[np.ndarray] = [np.zeros(0)] * len(parts)

        def give() -> dict[str, float]:
            found, told = self.token_advantages(parts, values, kl)
            ends = np.cumsum([part.batch.num_tokens for part in parts])[:-1]
            for part, own in zip(parts, np.split(found.advantages, ends), strict=True):
                part.advantages = own
                targets, spans = part.targets(), pairwise(part.batch.offsets.tolist())
                for sample, (start, end) in zip(part.samples, spans, strict=True):
                    mean = own[start:end][targets[start:end]]
                    sample.advantage = float(mean.mean()) if len(mean) else 0.0
            returns[:] = np.split(found.returns, ends)
            return told

        told = from_first_rank(give)
        for part, own_returns in zip(parts, returns, strict=True):
            for batch, field in zip(
                part.batches, scatter_to_packed(part.packed, part.advantages), strict=True
            ):
                batch.advantages = field
            for batch, field in zip(part.batches, scatter_to_packed(part.packed, own_returns), strict=True):
                batch.returns = field
        return told

    def token_advantages(
        self, parts: list[Part], values: np.ndarray, kl: np.ndarray | None
    ) -> tuple[TokenAdvantages, dict[str, float]]:
        """On rank 0: GAE of all parts' tokens end to end, and what is logged about it."""
        algorithm = self.algorithm
        offsets = np.concatenate([[0], np.concatenate([part.batch.lengths for part in parts]).cumsum()])
        targets = np.concatenate([part.targets() for part in parts])
        places, rewards = turn_rewards([sample for part in parts for sample in part.samples], offsets)
        found = token_advantages(
            places,
            rewards,
            values,
            targets,
            offsets,
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            normalize=algorithm.normalize_advantages,
            kl=kl,
            kl_coef=algorithm.kl_reward_coef,
        )
        told = {"return_mean": float(found.returns[targets].mean())}
        if found.explained_variance is not None:
            told["explained_variance"] = found.explained_variance
        if kl is not None:
            told["kl_reward"] = float(kl[targets].mean())
        return found, told

    def train(self, parts: list[Part], trains_policy: bool) -> tuple[list[Any], list[dict[str, float]]]:
        """Every optimizer step of the batch, in order: the policy's results and the critic's."""
        epochs = self.algorithm.num_epochs_per_batch
        results, critic_results = [], []
        with (
            self.run.timers("train"),
            self.run.console.progress("train", total=epochs * len(parts)) as advance,
        ):
            for part in parts * epochs:
                found = score_step(self.critic, part.batches, self.value_loss, "targets")
                renamed = {"grad_norm": "critic_grad_norm", "lr": "critic_lr"}
                critic_results.append({renamed.get(name, name): value for name, value in found.items()})
                if trains_policy:
                    results.append(policy_step(self.policy, part.batches, self.loss, self.config))
                advance(1)
        return results, critic_results


def _old_values(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_values is not None
    return batch.old_values


def _k1(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return batch.old_logprobs - batch.ref_logprobs
