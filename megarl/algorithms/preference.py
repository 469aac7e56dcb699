"""Preference training: a policy with DPO and its relatives, or a reward model.

With rho = logp - logp of the reference, of the chosen (c) and rejected (r) response of a pair, lower-case
sigma the logistic function, and r_c, r_r a reward model's scores of the last tokens::

    dpo           -log sigma(beta (rho_c - rho_r))      Rafailov et al. 2023, arXiv:2305.18290
    reward model  -log sigma(r_c - r_r)                 Ouyang et al. 2022, arXiv:2203.02155

losses/preference.py adds ipo, kto, simpo and orpo, losses/reward.py the reward model's centring term. A step
takes ``training.batch_size`` pairs; both responses of a pair share a microbatch. Reference logprobs are
computed once, before the first step, or for streamed pairs in each step. A reward model is exported as a
directory that ``AutoModelForSequenceClassification`` loads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from megarl.config.preference import DpoConfig, RmConfig
from megarl.data.preference import Pairs
from megarl.loops.datasets import load_preference_pairs
from megarl.loops.offline import Objective, run_offline
from megarl.loops.reference_logprobs import ReferenceLogprobs, StepReference
from megarl.losses.preference import PreferenceLoss, num_targets, options_of
from megarl.losses.reward import RewardLoss
from megarl.models.table import Architecture
from megarl.records import PackedBatch, TrainBatch
from megarl.runs.training_run import TrainingRun
from megarl.trainer.build import build_scorer, build_trainer
from megarl.trainer.interface import RankContext
from megarl.trainer.passes import (
    evaluate_loss,
    evaluate_score_loss,
    score_step,
    sequence_logprobs,
    train_step,
)
from megarl.weights.hf import has_score

HEADLINES = "loss", "reward_accuracy", "reward_margin"


def run_dpo(config: DpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_offline(config, "dpo", load_preference_pairs, DpoObjective)


def run_rm(config: RmConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    run_offline(config, "rm", load_preference_pairs, _reward_objective)


def _reward_objective(
    config: RmConfig, _run: TrainingRun, context: RankContext, architecture: Architecture
) -> RewardObjective:
    return RewardObjective(config, context, architecture)


class DpoObjective(Objective[Pairs, PreferenceLoss]):
    """Train a policy to prefer the chosen responses."""

    group_size = 2
    headlines = HEADLINES

    def __init__(
        self, config: DpoConfig, run: TrainingRun, context: RankContext, architecture: Architecture
    ) -> None:
        self.run, self.options = run, options_of(config.algorithm)
        self.trained = build_trainer(config, context, architecture, config.num_optimizer_steps)
        self.reference: ReferenceLogprobs | StepReference | None = None
        self.found: dict[str, float] | None = None
        if config.algorithm.uses_reference and config.data.streamed("train"):
            self.reference = StepReference(config, self.trained)
        elif config.algorithm.uses_reference:
            self.reference = ReferenceLogprobs(config, run, self.trained, architecture)

    def begin(self, rows: Callable[[], list[tuple[Pairs, list[int]]]]) -> None:
        """Compute the reference logprobs of every pair, while the policy still equals the reference."""
        if isinstance(self.reference, ReferenceLogprobs):
            batches = (
                batch for data, own in rows() for batch in (data.batch(own), self.mismatched(data, own))
            )
            self.found = self.reference.prepare(chain.from_iterable(batches))

    def loss(self, data: Pairs, rows: list[int], batch: TrainBatch) -> PreferenceLoss:
        """Return the loss with the pairs' reference logprobs and, for KTO, the current KL."""
        with self.run.timers("logprobs"):
            refs = None if self.reference is None else self.reference(batch)
        kl = 0.0
        if self.options.loss == "kto":
            assert self.reference is not None
            with self.run.timers("logprobs"):
                others = self.mismatched(data, rows)
                ratios = sequence_logprobs(self.trained, others) - self.reference(others)
            kl = max(0.0, float(ratios.mean()))
        return PreferenceLoss(self.options, num_targets(batch), refs, kl)

    def step(self, batches: list[PackedBatch], loss: PreferenceLoss) -> dict[str, float]:
        """See Objective."""
        return train_step(self.trained, batches, loss).metrics

    def validate(self, batches: list[PackedBatch], loss: PreferenceLoss) -> dict[str, float]:
        """See Objective."""
        return _held_out(evaluate_loss(self.trained, batches, loss))

    def mismatched(self, data: Pairs, rows: list[int]) -> TrainBatch:
        """Return mismatched prompts and responses to measure KTO's KL on; empty for other losses."""
        asked = rows if self.options.loss == "kto" else []
        return TrainBatch.of(sequence for i in asked for sequence in data.mismatched(i))

    def state(self) -> dict[str, Any]:
        """See Objective."""
        return {} if self.reference is None else {"reference": self.reference.model}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError unless the reference is the one the run began with."""
        if self.reference is not None and "reference" in state:
            self.reference.check_same_model(state["reference"])

    def summary(self) -> dict[str, Any]:
        """See Objective."""
        return {"reference": self.found}


class RewardObjective(Objective[Pairs, RewardLoss]):
    """Train a model to score the chosen response higher."""

    group_size = 2
    headlines = HEADLINES

    def __init__(self, config: RmConfig, context: RankContext, architecture: Architecture) -> None:
        self.path, self.center_coef = config.model.path, config.algorithm.center_coef
        self.trained = build_scorer(
            config, context, architecture, config.model, config.optimizer, config.num_optimizer_steps
        )

    def notes(self) -> list[str]:
        """See Objective."""
        head = f"that of {self.path}" if has_score(self.path) else "a new one, drawn with run.seed"
        return [f"score head: {head}"]

    def loss(self, data: Pairs, rows: list[int], batch: TrainBatch) -> RewardLoss:
        """See Objective."""
        return RewardLoss(len(rows), self.center_coef)

    def step(self, batches: list[PackedBatch], loss: RewardLoss) -> dict[str, float]:
        """See Objective."""
        return score_step(self.trained, batches, loss, "last")

    def validate(self, batches: list[PackedBatch], loss: RewardLoss) -> dict[str, float]:
        """See Objective."""
        return _held_out(evaluate_score_loss(self.trained, batches, loss, "last"))


def _held_out(found: dict[str, float]) -> dict[str, float]:
    names = {"loss": "loss", "reward_accuracy": "accuracy", "reward_margin": "margin"}
    return {f"validation_{name}": found[key] for key, name in names.items()}
