"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300).

What follows the rollout in a step, in data order (every rank)::

    graded groups -> advantages -> packing -> [old, reference logprobs] -> forward/backward -> optimizer

The formulas are in docs/algorithms.md, the loop around it in :mod:`megarl.algorithms.online`.
"""

from __future__ import annotations

from megarl.advantages.group import group_advantages
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.rollouts import split_groups
from megarl.algorithms.run import Run
from megarl.config.derived import needs_old_logprobs, needs_reference, without_effect
from megarl.config.schema import GrpoConfig
from megarl.losses.agreement import Agreement
from megarl.losses.policy import PolicyLoss, options_of
from megarl.packing.routing import experts_to_replay
from megarl.records import Group, PackedBatch, Sample, Sequence
from megarl.trainer.policy import Policy, TrainStepResult


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(config, "grpo", GrpoLearner)


class GrpoLearner:
    """Implements :class:`megarl.algorithms.online.Learner`."""

    def __init__(self, config: GrpoConfig, run: Run, policy: Policy) -> None:
        self.config, self.run, self.policy = config, run, policy
        self.loss = PolicyLoss(options_of(config.algorithm), config.debug.check_numerics)
        self.needs_old = needs_old_logprobs(config.algorithm)
        self.needs_reference = needs_reference(config.algorithm)

    def notes(self) -> list[str]:
        """See Learner."""
        for line in without_effect(self.config.algorithm):
            self.run.console.warn(line)
        old = "one forward pass per batch" if self.needs_old else "skipped (one on-policy optimizer step)"
        reference = "one forward pass per batch" if self.needs_reference else "skipped (kl_coef = 0)"
        return [f"old logprobs: {old}; reference logprobs: {reference}"]

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner."""
        self.give_advantages(groups)
        parts = self.split(groups)
        minibatches: list[list[PackedBatch]] = []
        computed = 0
        for part in parts:
            sequences = [to_sequence(s) for s in part]
            minibatches.append(self.policy.prepare(sequences, self.config.algorithm.loss_aggregation))
            computed += self.policy.num_computed_tokens
        agreement = self.fill_logprobs(minibatches)
        results = self.train(minibatches)
        if not self.needs_old:  # these very weights drew the samples
            agreement = results[0].agreement
        values = {name: sum(r.metrics[name] for r in results) / len(results) for name in results[0].metrics}
        values["lr"] = results[-1].metrics["lr"]
        values["num_microbatches"] = sum(len(batches) for batches in minibatches)
        tokens = sum(s.num_tokens for part in parts for s in part)
        values["num_tokens"], values["num_computed_tokens"] = tokens, computed
        values["tokens_per_second_train"] = (
            tokens * self.config.algorithm.num_epochs_per_batch / self.run.timers.seconds("train")
        )
        return Learned(values, agreement)

    def give_advantages(self, groups: list[Group]) -> None:
        """Set every sample's advantage from its group's rewards."""
        algorithm = self.config.algorithm
        rewards = [[float(s.reward or 0.0) for s in group.samples] for group in groups]
        advantages = group_advantages(
            rewards, baseline=algorithm.baseline, normalize_std=algorithm.normalize_std
        )
        for group, values in zip(groups, advantages, strict=True):
            for sample, advantage in zip(group.samples, values, strict=True):
                sample.advantage = advantage

    def split(self, groups: list[Group]) -> list[list[Sample]]:
        """The samples of each optimizer step: whole groups, in order, dealt evenly if some are missing."""
        return split_groups(groups, self.config.algorithm.num_optimizer_steps_per_batch)

    def fill_logprobs(self, minibatches: list[list[PackedBatch]]) -> Agreement:
        """The old and reference logprobs that are needed; engine against trainer, where old ones are."""
        temperature, agreement = self.config.rollout.temperature, Agreement()
        with self.run.timers("logprobs"):
            for batches in minibatches if self.needs_old else []:
                agreement = agreement + self.policy.fill_logprobs(
                    batches, "old_logprobs", temperature=temperature
                )
            if self.needs_reference:
                with self.policy.reference():
                    for batches in minibatches:
                        self.policy.fill_logprobs(batches, "ref_logprobs", temperature=temperature)
        return agreement

    def train(self, minibatches: list[list[PackedBatch]]) -> list[TrainStepResult]:
        """Every optimizer step of the batch, in order."""
        rollout, epochs = self.config.rollout, self.config.algorithm.num_epochs_per_batch
        results = []
        total = epochs * len(minibatches)
        with self.run.timers("train"), self.run.console.progress("train", total=total) as advance:
            for _ in range(epochs):
                for batches in minibatches:
                    results.append(
                        self.policy.train_step(
                            batches,
                            self.loss,
                            temperature=rollout.temperature,
                            top_k=rollout.top_k,
                            top_p=rollout.top_p,
                        )
                    )
                    advance(1)
        return results


def to_sequence(sample: Sample) -> Sequence:
    """A graded sample as a training sequence: the tokens the policy sampled are the targets."""
    prompt = len(sample.prompt_ids)
    assert sample.advantage is not None
    return Sequence(
        token_ids=sample.prompt_ids + sample.response_ids,
        loss_mask=[0] * prompt + sample.response_mask,
        advantage=sample.advantage,
        rollout_logprobs=[0.0] * prompt + sample.rollout_logprobs,
        num_prompt_tokens=prompt,
        experts=experts_to_replay(sample),
    )
