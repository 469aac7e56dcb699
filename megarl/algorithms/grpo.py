"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300) and its family.

What follows the rollout in a step::

    graded groups (rank 0) -> each rank's microbatches -> [old, reference logprobs] -> advantages (rank 0)
        -> forward/backward -> optimizer

Where advantages follow from the rewards alone they come first, and samples without one are not packed. The
formulas are in docs/algorithms.md, the loop around it in :mod:`megarl.algorithms.online`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megarl.algorithms.grpo_advantages import give_advantages
from megarl.algorithms.online import Learned, run_online
from megarl.algorithms.parts import Part, gather_parts, make_parts, pack_parts, placed
from megarl.algorithms.run import Run
from megarl.algorithms.updates import policy_step, train_speed
from megarl.algorithms.zero_advantages import computed_share, over_all_samples, with_gradient
from megarl.config.grpo import GrpoConfig
from megarl.losses.agreement import Agreement
from megarl.losses.base import token_weights
from megarl.losses.policy import PolicyLoss, options_of
from megarl.records import Group, PackedBatch
from megarl.trainer.batches import gather_from_packed, scatter_to_packed, weigh_anew
from megarl.trainer.control import from_first_rank
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import TrainStepResult, fill_logprobs


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_online(config, "grpo", GrpoLearner)


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
        parts, values = self.split(step, groups)
        values |= pack_parts(self.policy, parts, self.algorithm.loss_aggregation, self.fixed_length)
        agreement = self.fill_logprobs(parts)
        if self.algorithm.max_logprob_error is not None:
            values["dropped_logprob_error"] = sum(self.drop_by_error(part) for part in parts)
        if self.why_all:
            values |= self.advantages_of_tokens(groups, parts)
        if self.algorithm.positive_nll_coef:
            values["positive_fraction"] = self.weigh_positives(parts)
        shares = self.shares_computed(parts)
        taught = [(part, share) for part, share in zip(parts, shares, strict=True) if share > 0]
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
            values |= placed([part for part, _ in taught])
        speed = train_speed(self.run, values["num_tokens"], self.algorithm.num_epochs_per_batch)
        return Learned(values | speed, agreement)

    def split(self, step: int, groups: list[Group]) -> tuple[list[Part], dict[str, Any]]:
        """One part per optimizer step, without the samples that are filtered; with advantages, if known."""
        filters = self.algorithm.filter_overlong

        def then(parts: list[Part]) -> dict[str, float]:
            values: dict[str, float] = {}
            if filters:
                trained = sum(len(part.samples) for part in parts)
                values["filtered_overlong"] = sum(len(group.samples) for group in groups) - trained
            if not self.why_all:
                values |= self.give_advantages(groups, parts)
                values["skipped_zero_advantage"] = leave_out_zeros(parts)
            return values

        return make_parts(
            groups,
            self.algorithm.num_optimizer_steps_per_batch,
            step - 1 if self.config.rollout.max_staleness else None,
            leave_out=lambda sample: filters and sample.finish_reason == "length",
            then=then,
        )

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
        errors, counts = gather_from_packed(part.packed, _logprob_error), part.num_targets

        def drop() -> int:
            bound = self.algorithm.max_logprob_error
            assert bound is not None
            spans = pairwise(part.batch.offsets.tolist())
            sums = np.array([errors[start:end].sum() for start, end in spans])
            dropped = np.flatnonzero(sums > bound * counts)
            counts[dropped] = 0
            for row in dropped.tolist():
                part.samples[row].info["dropped"] = "logprob_error"
            return len(dropped)

        if count := from_first_rank(drop):
            weigh_anew(part.packed, part.num_targets, self.algorithm.loss_aggregation, self.fixed_length)
        return count

    def advantages_of_tokens(self, groups: list[Group], parts: list[Part]) -> dict[str, float]:
        """Advantages to every microbatch, once its logprobs are known."""
        kl = gather_parts(parts, _k1) if self.algorithm.kl_reward_coef else None
        values = from_first_rank(lambda: self.give_advantages(groups, parts, kl))
        for part in parts:
            fields = scatter_to_packed(part.packed, part.advantages)
            for batch, field in zip(part.batches, fields, strict=True):
                batch.advantages = field
        return values

    def give_advantages(
        self, groups: list[Group], parts: list[Part], kl: np.ndarray | None = None
    ) -> dict[str, float]:
        """On rank 0: the ``advantages`` of every part, and what is logged about them."""
        longest = self.config.rollout.max_new_tokens
        return give_advantages(groups, parts, self.algorithm, max_new_tokens=longest, kl=kl)

    def weigh_positives(self, parts: list[Part]) -> float:
        """Weights 1 / (tokens with full marks) for the likelihood term; the share of such samples."""
        full = [np.array([(s.reward or 0.0) >= 1.0 for s in part.samples], dtype=bool) for part in parts]
        for part, good in zip(parts, full, strict=True):
            weights = token_weights(np.where(good, part.num_targets, 0), "token")
            for batch, field in zip(part.batches, scatter_to_packed(part.packed, weights), strict=True):
                batch.nll_weights = field
        return from_first_rank(lambda: int(sum(map(sum, full))) / max(sum(map(len, full)), 1))

    # --- optimizer steps ----------------------------------------------------------------------

    def shares_computed(self, parts: list[Part]) -> list[float]:
        """Of every part the share of its weights that is packed; 0 where nothing is left to learn."""

        def share(part: Part) -> float:
            counts = part.num_targets
            if part.only is None or not counts.any():
                return float(counts.any())
            weights = token_weights(counts, self.algorithm.loss_aggregation, self.fixed_length)
            return computed_share(weights, counts, part.only)

        return from_first_rank(lambda: [share(part) for part in parts])

    def train(self, parts: list[tuple[Part, float]]) -> list[TrainStepResult]:
        """Every optimizer step of the batch, in order; with each part the share of it that is computed."""
        epochs, results = self.algorithm.num_epochs_per_batch, []
        total = epochs * len(parts)
        with self.run.timers("train"), self.run.console.progress("train", total=total) as advance:
            for part, share in parts * epochs:
                result = policy_step(self.policy, part.batches, self.loss, self.config)
                if share < 1:
                    result.metrics = over_all_samples(result.metrics, share, is_mean=self.loss.is_mean)
                results.append(result)
                advance(1)
        return results


def leave_out_zeros(parts: list[Part]) -> int:
    """Have only sequences packed that have an advantage (all of a part where none has); how many are not."""
    skipped = 0
    for part in parts:
        assert part.advantages is not None
        only = with_gradient(part.advantages, part.num_targets)
        if len(only) < len(part.samples):
            part.only = only
            skipped += len(part.samples) - len(only)
    return skipped


def _logprob_error(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    return (batch.old_logprobs - batch.rollout_logprobs).abs()


def _k1(batch: PackedBatch) -> torch.Tensor:
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return batch.old_logprobs - batch.ref_logprobs
