"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300) and its family.

For a sample i of a group with rewards r, and rho_t the ratio of a token's probability to the old policy's::

    A_i = (r_i - mean r) / (std r + 1e-6)
    L   = mean over tokens of max(-A_i rho_t, -A_i clamp(rho_t, 1 - c_low, 1 + c_high)) + kl_coef KL_t

Variants are options (formulas: docs/algorithms.md) or user functions (docs/guides/custom-losses.md).
After the rollout, a step runs::

    groups (rank 0) -> each rank's microbatches -> [logprobs] -> advantages (rank 0) -> optimizer steps

Where advantages depend on rewards only, they come first, and samples with advantage 0 are not packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from megarl.advantages.custom import custom_advantages, load_advantage
from megarl.advantages.group import group_advantages, named_rewards
from megarl.advantages.shaping import add_kl_to_go, clip_advantages, overlong_penalty, standardize
from megarl.algorithms import filters
from megarl.cluster.collectives import from_first_rank
from megarl.config.grpo import GrpoConfig
from megarl.loops import minibatches
from megarl.loops.minibatches import MiniBatch
from megarl.loops.online import Learned, run_online
from megarl.losses.custom import configured_loss
from megarl.records import Group, Sample
from megarl.runs.training_run import TrainingRun
from megarl.trainer.interface import Trainer


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(config, "grpo", GrpoLearner)


class GrpoLearner:
    """Implements :class:`megarl.loops.online.Learner`."""

    def __init__(self, config: GrpoConfig, run: TrainingRun, policy: Trainer) -> None:
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
        minis, values = self.split(step, groups)
        values |= minibatches.pack(policy, minis, *self.weighing)
        old = algorithm.old_logprobs_from
        minibatches.trace_first(minis, self.config.logging.samples_per_step, old)
        mismatch = minibatches.old_and_reference(policy, minis, self.config, self.run, old)
        values |= filters.drop_by_error(minis, algorithm.max_logprob_error, *self.weighing)
        values |= filters.drop_rejected(minis, algorithm, *self.weighing)
        if self.why_all:
            kl = minibatches.gather(minis, minibatches.kl_to_reference) if algorithm.kl_reward_coef else None
            values |= from_first_rank(lambda: self.give_advantages(groups, minis, kl))
            minibatches.scatter(minis, "advantages", [mini.known_advantages for mini in minis])
        values |= filters.weigh_positives(minis) if algorithm.positive_nll_coef else {}
        taught = filters.with_targets(minis, *self.weighing)
        if skipped := algorithm.num_optimizer_steps_per_batch - len(taught):
            self.run.console.warn(
                f"step {step}: {skipped} optimizer step(s) have no sample in the loss: skipped"
            )
        results = []
        for mini, share in minibatches.epochs(self.run, taught, algorithm.num_epochs_per_batch):
            result = minibatches.policy_step(policy, mini, self.loss, self.config)
            result.metrics = filters.over_all_samples(result.metrics, share, is_mean=self.loss.is_mean)
            results.append(result)
        if results and not algorithm.needs_old_logprobs:  # computed with the weights before the step
            mismatch = results[0].mismatch
        values |= minibatches.mean_metrics([result.metrics for result in results])
        values |= minibatches.split_metrics([mini for mini, _ in taught])
        values |= minibatches.train_speed(self.run, values, algorithm)
        return Learned(values, mismatch, minibatches.traced(policy, minis))

    def split(self, step: int, groups: list[Group]) -> tuple[list[MiniBatch], dict[str, Any]]:
        """Build one mini-batch per optimizer step, filtered, with advantages if they are known already."""
        overlong = self.algorithm.filter_overlong

        def then(minis: list[MiniBatch]) -> dict[str, float]:
            values: dict[str, float] = {}
            if overlong:
                left = sum(len(mini.samples) for mini in minis)
                values["filtered_overlong"] = sum(len(group.samples) for group in groups) - left
            if not self.why_all:
                values |= self.give_advantages(groups, minis)
                values["skipped_zero_advantage"] = filters.leave_out_zeros(minis)
            return values

        return minibatches.make(
            groups,
            self.algorithm.num_optimizer_steps_per_batch,
            step - 1 if self.config.rollout.max_staleness else None,
            leave_out=lambda sample: overlong and sample.finish_reason == "length",
            then=then,
        )

    def _rewards(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return the rewards [S], less the penalty of overlong responses."""
        rewards = np.array([float(sample.reward or 0.0) for sample in samples])
        if (buffer := self.algorithm.overlong_buffer) is not None:
            lengths, longest = [len(s.response_ids) for s in samples], self.config.rollout.max_new_tokens
            penalty = overlong_penalty(np.array(lengths), max_tokens=longest, buffer=buffer)
            rewards += self.algorithm.overlong_penalty * penalty
        return rewards

    def give_advantages(
        self, groups: list[Group], minis: list[MiniBatch], kl: np.ndarray | None = None
    ) -> dict[str, float]:
        """Set the advantages of every mini-batch and sample (rank 0); return metrics about them.

        ``kl`` [T], with kl_reward_coef: the k1 estimate against the reference of every target, mini-batches
        end to end.
        """
        algorithm, values = self.algorithm, dict[str, float]()
        samples = [sample for group in groups for sample in group.samples]
        trained = np.concatenate([np.zeros(0, dtype=np.int64), *(mini.numbers for mini in minis)])
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *(mini.num_targets for mini in minis)])
        offsets, by_token = minibatches.token_offsets(minis), algorithm.kl_reward_level == "token"

        rewards = self._rewards(samples)
        if kl is not None:
            sums = np.add.reduceat(kl, offsets[:-1])
            values["kl_reward"] = float(sums.sum()) / max(int(counts.sum()), 1)
            rewards[trained] -= 0.0 if by_token else algorithm.kl_reward_coef * sums
        if algorithm.overlong_buffer is not None or not (kl is None or by_token):
            values["shaped_reward_mean"] = float(rewards.mean())

        if self.own_advantage is not None:
            found = custom_advantages(self.own_advantage, str(algorithm.advantage), groups, rewards)
        else:
            weights = algorithm.reward_weights
            parts = [rewards] if weights is None else named_rewards(samples, list(weights))
            best = [group.greedy for group in groups if group.greedy is not None]
            greedy: Sequence[np.ndarray | None] = [None] * len(parts)
            if algorithm.samples_greedily:
                assert len(best) == len(groups), "a group without its greedy response is dropped"
                greedy = (
                    [self._rewards(best)] if weights is None else list(named_rewards(best, list(weights)))
                )
                values["greedy_reward_mean"] = float(np.mean([sample.reward for sample in best]))
            bounds = np.array([0, *accumulate(len(group.samples) for group in groups)])
            sampled = np.array([sample.num_sampled_tokens for sample in samples])
            each = [
                group_advantages(
                    part,
                    bounds,
                    baseline=algorithm.baseline,
                    normalize_std=algorithm.normalize_std,
                    lengths=sampled,
                    greedy=theirs,
                )
                for part, theirs in zip(parts, greedy, strict=True)
            ]
            found = each[0] if weights is None else np.array(list(weights.values())) @ np.array(each)
        for sample, advantage in zip(samples, found.tolist(), strict=True):
            sample.advantage = advantage
        advantages = found[trained]
        if kl is not None and by_token:
            advantages = add_kl_to_go(advantages, kl, offsets, algorithm.kl_reward_coef)
            counts = np.concatenate([mini.targets() for mini in minis])
        if algorithm.normalize_batch:
            advantages = standardize(advantages, counts)
        if (bound := algorithm.advantage_clip) is not None:
            advantages, values["advantage_clipped_fraction"] = clip_advantages(advantages, counts, bound)
        minibatches.set_advantages(minis, advantages)
        return values
