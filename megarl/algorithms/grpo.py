"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300) and its family.

For a sample i of a group with rewards r, and rho_t the ratio of a token's probability to the old policy's::

    A_i = (r_i - mean r) / (std r + 1e-6)
    L   = mean over tokens of max(-A_i rho_t, -A_i clamp(rho_t, 1 - c_low, 1 + c_high)) + kl_coef KL_t

Variants are options (formulas: docs/algorithms.md) or functions of your own (docs/guides/custom-losses.md).
What follows the rollout in a step::

    groups (rank 0) -> each rank's microbatches -> [logprobs] -> advantages (rank 0) -> optimizer steps

Where advantages follow from the rewards alone they come first, and samples without one are not packed.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from megarl.advantages.custom import custom_advantages, load_advantage
from megarl.advantages.group import group_advantages
from megarl.advantages.shaping import add_kl_to_go, clip_advantages, overlong_penalty, standardize
from megarl.algorithms import filters
from megarl.algorithms import parts as steps
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.parts import Part
from megarl.algorithms.run import Run
from megarl.config.grpo import GrpoConfig
from megarl.losses.custom import configured_loss
from megarl.records import Group
from megarl.trainer.control import from_first_rank
from megarl.trainer.interface import Trainer


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(config, "grpo", GrpoLearner)


class GrpoLearner:
    """Implements :class:`megarl.algorithms.online.Learner`."""

    def __init__(self, config: GrpoConfig, run: Run, policy: Trainer) -> None:
        self.config, self.run, self.policy, self.trained = config, run, policy, policy
        self.algorithm = algorithm = config.algorithm
        self.loss = configured_loss(algorithm, check_numerics=config.debug.check_numerics)
        self.own_advantage = load_advantage(algorithm.advantage)
        self.weighing = algorithm.loss_aggregation, algorithm.loss_length or config.rollout.max_new_tokens
        self.why_all = config.why_zero_advantages_train

    def notes(self) -> list[str]:
        """See Learner."""
        return self.config.describe_algorithm()

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner."""
        algorithm, policy = self.algorithm, self.policy
        parts, values = self.split(step, groups)
        values |= steps.pack_parts(policy, parts, *self.weighing)
        agreement = steps.old_and_reference(policy, parts, self.config, self.run, algorithm.old_logprobs_from)
        values |= filters.drop_by_error(parts, algorithm.max_logprob_error, *self.weighing)
        if self.why_all:
            kl = steps.gather_parts(parts, steps.kl_to_reference) if algorithm.kl_reward_coef else None
            values |= from_first_rank(lambda: self.give_advantages(groups, parts, kl))
            steps.scatter_parts(parts, "advantages", [part.known_advantages for part in parts])
        values |= filters.weigh_positives(parts) if algorithm.positive_nll_coef else {}
        taught = filters.with_targets(parts, *self.weighing)
        if skipped := algorithm.num_optimizer_steps_per_batch - len(taught):
            why = "for none of their samples is in the loss"
            self.run.console.warn(f"step {step}: {skipped} optimizer step(s) per pass left out, {why}")
        results = []
        for part, share in steps.passes(self.run, taught, algorithm.num_epochs_per_batch):
            result = steps.policy_step(policy, part, self.loss, self.config)
            result.metrics = filters.over_all_samples(result.metrics, share, is_mean=self.loss.is_mean)
            results.append(result)
        if results and not algorithm.needs_old_logprobs:  # the weights of before the step
            agreement = results[0].agreement
        values |= steps.mean_metrics([result.metrics for result in results])
        values |= steps.placed([part for part, _ in taught])
        return Learned(values | steps.train_speed(self.run, values, algorithm), agreement)

    def split(self, step: int, groups: list[Group]) -> tuple[list[Part], dict[str, Any]]:
        """One part per optimizer step, without the samples that are filtered; with advantages, if known."""
        overlong = self.algorithm.filter_overlong

        def then(parts: list[Part]) -> dict[str, float]:
            values: dict[str, float] = {}
            if overlong:
                left = sum(len(part.samples) for part in parts)
                values["filtered_overlong"] = sum(len(group.samples) for group in groups) - left
            if not self.why_all:
                values |= self.give_advantages(groups, parts)
                values["skipped_zero_advantage"] = filters.leave_out_zeros(parts)
            return values

        return steps.make_parts(
            groups,
            self.algorithm.num_optimizer_steps_per_batch,
            step - 1 if self.config.rollout.max_staleness else None,
            leave_out=lambda sample: overlong and sample.finish_reason == "length",
            then=then,
        )

    def give_advantages(
        self, groups: list[Group], parts: list[Part], kl: np.ndarray | None = None
    ) -> dict[str, float]:
        """On rank 0: advantages to every part and sample; what is logged about them.

        ``kl`` [T] is k1 to the reference of every target, all parts' tokens end to end, with kl_reward_coef.
        """
        algorithm, values = self.algorithm, dict[str, float]()
        samples = [sample for group in groups for sample in group.samples]
        trained = np.concatenate([np.zeros(0, dtype=np.int64), *(part.numbers for part in parts)])
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.num_targets for part in parts)])
        offsets, by_token = steps.token_offsets(parts), algorithm.kl_reward_level == "token"

        rewards = np.array([float(sample.reward or 0.0) for sample in samples])
        if (buffer := algorithm.overlong_buffer) is not None:
            lengths, longest = [len(s.response_ids) for s in samples], self.config.rollout.max_new_tokens
            penalty = overlong_penalty(np.array(lengths), max_tokens=longest, buffer=buffer)
            rewards += algorithm.overlong_penalty * penalty
        if kl is not None:
            sums = np.add.reduceat(kl, offsets[:-1])
            values["kl_reward"] = float(sums.sum()) / max(int(counts.sum()), 1)
            rewards[trained] -= 0.0 if by_token else algorithm.kl_reward_coef * sums
        if algorithm.overlong_buffer is not None or not (kl is None or by_token):
            values["shaped_reward_mean"] = float(rewards.mean())

        if self.own_advantage is not None:
            found = custom_advantages(self.own_advantage, str(algorithm.advantage), groups, rewards)
        else:
            bounds = np.array([0, *accumulate(len(group.samples) for group in groups)])
            found = group_advantages(
                rewards, bounds, baseline=algorithm.baseline, normalize_std=algorithm.normalize_std
            )
        for sample, advantage in zip(samples, found.tolist(), strict=True):
            sample.advantage = advantage
        advantages = found[trained]
        if kl is not None and by_token:
            advantages = add_kl_to_go(advantages, kl, offsets, algorithm.kl_reward_coef)
            counts = np.concatenate([part.targets() for part in parts])
        if algorithm.normalize_batch:
            advantages = standardize(advantages, counts)
        if (bound := algorithm.advantage_clip) is not None:
            advantages, values["advantage_clipped_fraction"] = clip_advantages(advantages, counts, bound)
        steps.set_advantages(parts, advantages)
        return values
