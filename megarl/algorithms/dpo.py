"""Training on preference pairs: DPO and its relatives (losses/preference.py has formulas and papers).

reference logprobs (once, before the first step) -> pairs -> packing -> forward/backward -> optimizer. Each
step consumes ``training.batch_size`` pairs over all ranks; both responses of a pair share a microbatch.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from megarl.algorithms.examples import load_preference_pairs, load_splits
from megarl.algorithms.model import check_fits, describe_model, read_model
from megarl.algorithms.pairs import HEADLINES, train_metrics, validates, validation_metrics
from megarl.algorithms.reference import ReferenceLogprobs
from megarl.algorithms.run import Run
from megarl.config.preference import DpoConfig
from megarl.data.order import held_out_rows, order_of
from megarl.data.preference import Pairs
from megarl.losses.preference import PreferenceLoss, num_targets, options_of
from megarl.records import TrainBatch
from megarl.trainer.build import build_trainer, finalize, initialize
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import evaluate_loss, sequence_logprobs, train_step


def run_dpo(config: DpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    architecture, tokenizer, longest = read_model(config)
    train, held_out = load_splits(load_preference_pairs, config, tokenizer, longest)
    context = initialize(config.parallel, config.run.seed)
    check_fits(config, architecture, context)
    with Run(config, "dpo", is_first=context.is_first) as run:
        run.tell(train, held_out)
        policy = build_trainer(config, context, architecture, config.training.num_steps)
        for line in describe_model(context.platform.name, config, architecture):
            run.console.note(line)
        loop = _DpoLoop(config, run, policy, train, held_out)
        if config.algorithm.uses_reference:
            loop.prepare_reference(ReferenceLogprobs(config, run, policy, architecture))
        state = run.resume(policy) or {"step": 0, "position": 0, "totals": {}}
        loop.run(state)
        run.export(policy, architecture)
    finalize()


class _DpoLoop:
    """The loop with all it drives."""

    def __init__(
        self, config: DpoConfig, run: Run, policy: Trainer, train: Pairs, held_out: Pairs | None
    ) -> None:
        self.config, self.run_, self.policy, self.train = config, run, policy, train
        self.options = options_of(config.algorithm)
        self.reference: ReferenceLogprobs | None = None
        self.reference_facts: dict[str, float] = {}
        self.order = order_of(train, config.data.shuffle, config.run.seed)
        self.held_out = held_out
        self.validation: list[int] = []
        if held_out is not None:
            self.validation = held_out_rows(held_out, min(config.training.validation_size, len(held_out)))

    def prepare_reference(self, reference: ReferenceLogprobs) -> None:
        """Reference logprobs of every pair that the run will see; before a checkpoint is loaded."""
        training = self.config.training
        drawn = sorted(set(self.order.batch(0, training.num_steps * training.batch_size)))
        batches = [self.train.batch(drawn), self.mismatched(self.train, drawn)]
        if self.held_out is not None:
            batches.append(self.held_out.batch(self.validation))
            batches.append(self.mismatched(self.held_out, self.validation))
        self.reference, self.reference_facts = reference, reference.prepare(chain.from_iterable(batches))

    def run(self, state: dict[str, Any]) -> None:
        """From the state of the last finished step to the last step."""
        config, run, reference = self.config, self.run_, self.reference
        if reference is not None and "reference" in state:
            reference.check_same_model(state["reference"])
        position, totals = state["position"], dict(state["totals"])
        training, last = config.training, config.training.num_steps
        run.timers.start_step()
        for step in range(state["step"] + 1, last + 1):
            indices = self.order.batch(position, training.batch_size)
            position += training.batch_size
            values = self.learn(indices)
            if self.validation and validates(config, step):
                held = self.evaluate()
                values |= held
                totals |= held
            run.log(step, values)
            totals |= {name: values[name] for name in HEADLINES}
            totals["wall_seconds"] = totals.get("wall_seconds", 0.0) + run.timers.last_step["seconds"]
            kept = {"position": position, "totals": totals}
            if reference is not None:
                kept["reference"] = reference.model
            run.after_step(step, last, self.policy, kept)
        run.finish({"dpo_steps": last, **totals, "reference": self.reference_facts or None})

    def learn(self, indices: list[int]) -> dict[str, float]:
        """One optimizer step on the pairs ``indices``."""
        pairs = self.train.batch(indices)
        loss = self.loss(self.train, indices, pairs)
        packed = self.policy.prepare(pairs, "token", group_size=2)
        with self.run_.timers("train"):
            values = dict(train_step(self.policy, packed.batches, loss, temperature=1.0).metrics)
        return values | train_metrics(self.run_, packed)

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the held-out pairs."""
        assert self.held_out is not None
        pairs = self.held_out.batch(self.validation)
        loss = self.loss(self.held_out, self.validation, pairs)
        packed = self.policy.prepare(pairs, "token", group_size=2)
        return validation_metrics(evaluate_loss(self.policy, packed.batches, loss))

    def loss(self, pairs: Pairs, indices: list[int], batch: TrainBatch) -> PreferenceLoss:
        """The loss of these pairs, with their reference logprobs and, for KTO, the KL as it is now."""
        refs, kl = None, 0.0
        if self.reference is not None:
            refs = self.reference(batch)
        if self.options.loss == "kto":
            assert self.reference is not None
            with self.run_.timers("logprobs"):
                others = self.mismatched(pairs, indices)
                ratios = sequence_logprobs(self.policy, others) - self.reference(others)
            kl = max(0.0, float(ratios.mean()))
        return PreferenceLoss(self.options, num_targets(batch), refs, kl)

    def mismatched(self, pairs: Pairs, indices: list[int]) -> TrainBatch:
        """What KTO's KL is measured on: prompts with other prompts' responses; nothing for other losses."""
        if self.options.loss != "kto":
            return TrainBatch.of([])
        return TrainBatch.of(sequence for i in indices for sequence in pairs.mismatched(i))
