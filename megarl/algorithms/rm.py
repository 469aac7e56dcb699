"""Training a reward model on preference pairs (losses/reward.py has the formula and papers).

pairs -> packing -> forward/backward -> optimizer. Each step consumes ``training.batch_size`` pairs over all
ranks; both responses of a pair share a microbatch. What is exported is a Hugging Face directory that
``AutoModelForSequenceClassification`` loads.
"""

from __future__ import annotations

from typing import Any

from megarl.algorithms.examples import load_preference_pairs, load_splits
from megarl.algorithms.model import check_fits, describe_model, read_model
from megarl.algorithms.pairs import HEADLINES, train_metrics, validates, validation_metrics
from megarl.algorithms.run import Run
from megarl.config.preference import RmConfig
from megarl.data.order import held_out_rows, order_of
from megarl.data.preference import Pairs
from megarl.losses.reward import RewardLoss
from megarl.trainer.build import build_scorer, finalize, initialize
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import evaluate_score_loss, score_step
from megarl.weights.hf import has_score


def run_rm(config: RmConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    architecture, tokenizer, longest = read_model(config)
    train, held_out = load_splits(load_preference_pairs, config, tokenizer, longest)
    context = initialize(config.parallel, config.run.seed)
    check_fits(config, architecture, context)
    with Run(config, "rm", is_first=context.is_first) as run:
        run.tell(train, held_out)
        scorer = build_scorer(
            config, context, architecture, config.model, config.optimizer, config.training.num_steps
        )
        for line in describe_model(context.platform.name, config, architecture):
            run.console.note(line)
        head = (
            f"that of {config.model.path}"
            if has_score(config.model.path)
            else "a new one, drawn with run.seed"
        )
        run.console.note(f"score head: {head}")
        state = run.resume(scorer) or {"step": 0, "position": 0, "totals": {}}
        _train(config, run, scorer, train, held_out, state)
        run.export(scorer, scorer.architecture)
    finalize()


def _train(
    config: RmConfig, run: Run, scorer: Trainer, train: Pairs, held_out: Pairs | None, state: dict[str, Any]
) -> None:
    """From the state of the last finished step to the last step."""
    training, last = config.training, config.training.num_steps
    order = order_of(train, config.data.shuffle, config.run.seed)
    size = 0 if held_out is None else min(training.validation_size, len(held_out))
    position, totals = state["position"], dict(state["totals"])
    run.timers.start_step()
    for step in range(state["step"] + 1, last + 1):
        pairs = train.batch(order.batch(position, training.batch_size))
        position += training.batch_size
        loss = RewardLoss(training.batch_size, config.algorithm.center_coef)
        packed = scorer.prepare(pairs, "token", group_size=2)
        with run.timers("train"):
            values = score_step(scorer, packed.batches, loss, "last")
        values |= train_metrics(run, packed)
        if held_out is not None and validates(config, step):
            validation = held_out.batch(held_out_rows(held_out, size))
            held = evaluate_score_loss(
                scorer,
                scorer.prepare(validation, "token", group_size=2).batches,
                RewardLoss(size, config.algorithm.center_coef),
                "last",
            )
            found = validation_metrics(held)
            values |= found
            totals |= found
        run.log(step, values)
        totals |= {name: values[name] for name in HEADLINES}
        totals["wall_seconds"] = totals.get("wall_seconds", 0.0) + run.timers.last_step["seconds"]
        run.after_step(step, last, scorer, {"position": position, "totals": totals})
    run.finish({"rm_steps": last, **totals})
