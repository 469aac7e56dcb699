"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300) and its family.

What follows the rollout in a step, in data order (every rank)::

    graded groups -> packing -> [old, reference logprobs] -> advantages -> forward/backward -> optimizer

Where advantages follow from the rewards alone they come first, and samples without one are not packed. The
formulas are in docs/algorithms.md, the loop around it in :mod:`megarl.algorithms.online`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from megarl.algorithms.grpo_advantages import give_advantages
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.rollouts import split_groups
from megarl.algorithms.run import Run
from megarl.algorithms.updates import policy_step, train_speed
from megarl.algorithms.zero_advantages import computed_share, over_all_samples, with_gradient
from megarl.config.grpo import GrpoConfig
from megarl.losses.agreement import Agreement
from megarl.losses.base import per_token, token_weights
from megarl.losses.policy import PolicyLoss, options_of
from megarl.packing.routing import experts_to_replay
from megarl.packing.token_values import Array, put
from megarl.records import Group, PackedBatch, Sample, Sequence
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import TrainStepResult, fill_logprobs, token_values


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(config, "grpo", GrpoLearner)


@dataclass(slots=True)
class Part:
    """What one optimizer step learns from: samples and their sequences, and this rank's microbatches."""

    samples: list[Sample]
    sequences: list[Sequence]
    batches: list[PackedBatch] = field(default_factory=list)
    only: list[int] | None = None  # the sequences that are packed, where not all are

    @property
    def has_targets(self) -> bool:
        """Whether any token is left to learn from."""
        return any(any(s.loss_mask[1:]) for s in self.sequences)


class GrpoLearner:
    """Implements :class:`megarl.algorithms.online.Learner`."""

    def __init__(self, config: GrpoConfig, run: Run, policy: Trainer) -> None:
        self.config, self.run, self.policy = config, run, policy
        self.trained = policy
        self.algorithm = algorithm = config.algorithm
        self.loss = PolicyLoss(
            options_of(algorithm),
            config.debug.check_numerics,
            nll_coef=algorithm.positive_nll_coef,
            is_mean=algorithm.loss_aggregation != "fixed_length",
        )
        self.fixed_length = algorithm.loss_length or config.rollout.max_new_tokens
        self.needs_old = algorithm.needs_old_logprobs
        self.needs_reference = algorithm.needs_reference
        self.why_all = config.why_zero_advantages_train

    def notes(self) -> list[str]:
        """See Learner."""
        old = (
            "one forward pass per batch" if self.needs_old else f"skipped ({self.algorithm.why_no_old_pass})"
        )
        reference = "one forward pass per batch" if self.needs_reference else "skipped (kl_coef = 0)"
        zero = f"trained on ({self.why_all})" if self.why_all else "counted, and not computed"
        return [
            f"old logprobs: {old}; reference logprobs: {reference}",
            f"samples whose advantage is 0: {zero}",
        ]

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner."""
        version = step - 1 if self.config.rollout.max_staleness else None
        parts, values = self.split(groups, version)
        advantages: list[Array] = []
        if not self.why_all:
            advantages = self.advantages(groups, parts, values)
            values["skipped_zero_advantage"] = leave_out_zeros(parts, advantages)
        values |= self.pack(parts)
        agreement = self.fill_logprobs(parts)
        if self.algorithm.max_logprob_error is not None:
            values["dropped_logprob_error"] = sum(self.drop_by_error(part) for part in parts)
        if self.why_all:
            advantages = self.advantages(groups, parts, values)
        self.set_advantages(parts, advantages)
        if self.algorithm.positive_nll_coef:
            values["positive_fraction"] = self.weigh_positives(parts)
        taught = [part for part in parts if part.has_targets]
        if skipped := self.algorithm.num_optimizer_steps_per_batch - len(taught):
            self.run.console.warn(
                f"step {step}: {skipped} optimizer step(s) per pass left out, for none of their samples is "
                "in the loss"
            )
        results = self.train(taught)
        if not self.needs_old and results:  # the weights of before the step
            agreement = results[0].agreement
        if results:
            first = results[0].metrics
            values |= {name: sum(r.metrics[name] for r in results) / len(results) for name in first}
            values["lr"] = results[-1].metrics["lr"]
        speed = train_speed(self.run, values["num_tokens"], self.algorithm.num_epochs_per_batch)
        return Learned(values | speed, agreement)

    # --- from samples to microbatches ---------------------------------------------------------

    def split(self, groups: list[Group], version: int | None) -> tuple[list[Part], dict[str, float]]:
        """Whole groups, in order, to one part per optimizer step; without the samples that are filtered."""
        parts, filtered = [], 0
        for samples in split_groups(groups, self.algorithm.num_optimizer_steps_per_batch):
            if self.algorithm.filter_overlong:
                kept = [sample for sample in samples if sample.finish_reason != "length"]
                filtered += len(samples) - len(kept)
                samples = kept
            if samples:
                parts.append(Part(samples, [to_sequence(s, version) for s in samples]))
        return parts, {"filtered_overlong": filtered} if self.algorithm.filter_overlong else {}

    def pack(self, parts: list[Part]) -> dict[str, float]:
        """Microbatches to every part; how many there are, and of how many tokens."""
        computed = 0
        for part in parts:
            part.batches = self.policy.prepare(
                part.sequences,
                self.algorithm.loss_aggregation,
                fixed_length=self.fixed_length,
                only=part.only,
            )
            computed += self.policy.num_computed_tokens
        packed = [part.samples[i] for part in parts for i in part.only or range(len(part.samples))]
        return {
            "num_microbatches": sum(len(part.batches) for part in parts),
            "num_tokens": sum(sample.num_tokens for sample in packed),
            "num_computed_tokens": computed,
        }

    # --- logprobs, and what follows from them -------------------------------------------------

    def fill_logprobs(self, parts: list[Part]) -> Agreement:
        """The old and reference logprobs that are needed; engine against trainer, where old ones are."""
        temperature, agreement = self.config.rollout.temperature, Agreement()
        with self.run.timers("logprobs"):
            for part in parts:
                if self.needs_old:
                    agreement = agreement + fill_logprobs(
                        self.policy, part.batches, "old_logprobs", temperature=temperature
                    )
                elif self.algorithm.old_logprobs == "rollout":
                    for batch in part.batches:
                        batch.old_logprobs = batch.rollout_logprobs
            if self.needs_reference:
                with self.policy.reference():
                    for part in parts:
                        fill_logprobs(self.policy, part.batches, "ref_logprobs", temperature=temperature)
        return agreement

    def drop_by_error(self, part: Part) -> int:
        """Take sequences out of the loss on whose tokens engine and trainer disagree; how many."""
        bound, dropped = self.algorithm.max_logprob_error, 0
        assert bound is not None

        def error(batch: PackedBatch) -> torch.Tensor:
            assert batch.old_logprobs is not None
            assert batch.rollout_logprobs is not None
            return (batch.old_logprobs - batch.rollout_logprobs).abs()

        for i, errors in enumerate(token_values(self.policy, part.batches, error, part.sequences)):
            sequence = part.sequences[i]
            if errors.sum() > bound * sum(sequence.loss_mask[1:]):
                part.sequences[i] = replace(sequence, loss_mask=[0] * len(sequence.loss_mask))
                part.samples[i].info["dropped"] = "logprob_error"
                dropped += 1
        if dropped:
            weights = token_weights(part.sequences, self.algorithm.loss_aggregation, self.fixed_length)
            for batch in part.batches:
                batch.loss_weights = per_token(batch, weights)
        return dropped

    def kl_to_reference(self, parts: list[Part]) -> list[Array]:
        """k1 = old - ref logprob [n] of every sequence of the parts, 0 where there is no target."""

        def k1(batch: PackedBatch) -> torch.Tensor:
            assert batch.old_logprobs is not None
            assert batch.ref_logprobs is not None
            return batch.old_logprobs - batch.ref_logprobs

        return [kl for part in parts for kl in token_values(self.policy, part.batches, k1, part.sequences)]

    def advantages(self, groups: list[Group], parts: list[Part], values: dict[str, float]) -> list[Array]:
        """Advantages [n] of every sequence of the parts; what is logged about them goes to ``values``."""
        advantages, told = give_advantages(
            groups,
            [sample for part in parts for sample in part.samples],
            [sequence for part in parts for sequence in part.sequences],
            self.algorithm,
            max_new_tokens=self.config.rollout.max_new_tokens,
            kls=self.kl_to_reference(parts) if self.algorithm.kl_reward_coef else None,
        )
        values |= told
        return advantages

    def set_advantages(self, parts: list[Part], advantages: list[Array]) -> None:
        """Advantages [n] of every sequence of the parts to their microbatches."""
        start = 0
        for part in parts:
            end = start + len(part.sequences)
            for batch in part.batches:
                batch.advantages = put(advantages[start:end], batch)
            start = end

    def weigh_positives(self, parts: list[Part]) -> float:
        """Weights 1 / (tokens with full marks) for the likelihood term; the share of such samples."""
        positive = 0
        for part in parts:
            full = [(sample.reward or 0.0) >= 1.0 for sample in part.samples]
            positive += sum(full)
            masked = [
                s if good else replace(s, loss_mask=[0] * len(s.loss_mask))
                for s, good in zip(part.sequences, full, strict=True)
            ]
            weights = token_weights(masked, "token")
            for batch in part.batches:
                batch.nll_weights = per_token(
                    batch, [w if good else 0.0 for w, good in zip(weights, full, strict=True)]
                )
        return positive / max(sum(len(part.samples) for part in parts), 1)

    # --- optimizer steps ----------------------------------------------------------------------

    def train(self, parts: list[Part]) -> list[TrainStepResult]:
        """Every optimizer step of the batch, in order."""
        epochs, results = self.algorithm.num_epochs_per_batch, []
        total = epochs * len(parts)
        with self.run.timers("train"), self.run.console.progress("train", total=total) as advance:
            for part in parts * epochs:
                result = policy_step(self.policy, part.batches, self.loss, self.config)
                if part.only is not None:
                    aggregation = self.algorithm.loss_aggregation
                    share = computed_share(part.sequences, part.only, aggregation, self.fixed_length)
                    result.metrics = over_all_samples(result.metrics, share, is_mean=self.loss.is_mean)
                results.append(result)
                advance(1)
        return results


def leave_out_zeros(parts: list[Part], advantages: list[Array]) -> int:
    """Have only sequences packed that have an advantage (all of a part where none has); how many are not."""
    start, skipped = 0, 0
    for part in parts:
        end = start + len(part.sequences)
        only = with_gradient(advantages[start:end])
        if len(only) < len(part.sequences):
            part.only = only
            skipped += len(part.sequences) - len(only)
        start = end
    return skipped


def to_sequence(sample: Sample, version: int | None = None) -> Sequence:
    """A sample as a training sequence: the tokens the policy sampled are the targets.

    With ``version``, the trainer's, tokens of older versions are marked as stale.
    """
    prompt = len(sample.prompt_ids)
    return Sequence(
        token_ids=[*sample.prompt_ids.tolist(), *sample.response_ids.tolist()],
        loss_mask=[0] * prompt + sample.response_mask,
        rollout_logprobs=[0.0] * prompt + sample.rollout_logprobs.tolist(),
        num_prompt_tokens=prompt,
        experts=experts_to_replay(sample),
        stale=[] if version is None else [0] * prompt + [int(v < version) for v in sample.token_versions],
    )
