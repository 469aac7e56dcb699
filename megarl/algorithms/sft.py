"""Supervised fine-tuning.

demonstrations -> batch -> packing -> forward/backward -> optimizer. Each step consumes
``training.batch_size`` sequences over all ranks; the loss is the mean over all target tokens.
"""

from __future__ import annotations

from megarl.algorithms.examples import load_sequences, load_splits
from megarl.algorithms.model import check_fits, describe_model, read_model
from megarl.algorithms.run import Run
from megarl.config.sft import SftConfig
from megarl.data.order import held_out_rows, order_of
from megarl.losses.sft import sft_loss
from megarl.trainer.build import build_trainer, finalize, initialize
from megarl.trainer.passes import evaluate_loss, train_step


def run_sft(config: SftConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    architecture, tokenizer, longest = read_model(config)
    train, held_out = load_splits(load_sequences, config, tokenizer, longest)
    context = initialize(config.parallel, config.run.seed)
    check_fits(config, architecture, context)
    training, last = config.training, config.training.num_steps
    with Run(config, "sft", is_first=context.is_first) as run:
        run.tell(train, held_out)
        policy = build_trainer(config, context, architecture, last)
        for line in describe_model(context.platform.name, config, architecture):
            run.console.note(line)
        state = run.resume(policy) or {"step": 0, "position": 0, "totals": {}}
        order = order_of(train, config.data.shuffle, config.run.seed)
        position, totals = state["position"], dict(state["totals"])
        validation = None
        if held_out is not None:
            size = min(training.validation_size, len(held_out))
            validation = held_out.batch(held_out_rows(held_out, size))
        run.timers.start_step()
        for step in range(state["step"] + 1, last + 1):
            packed = policy.prepare(train.batch(order.batch(position, training.batch_size)), "token")
            position += training.batch_size
            with run.timers("train"):
                result = train_step(policy, packed.batches, sft_loss, temperature=1.0)
            values = result.metrics | packed.placed
            at_interval = training.validation_interval and step % training.validation_interval == 0
            if validation is not None and (at_interval or step == last):
                held = evaluate_loss(policy, policy.prepare(validation, "token").batches, sft_loss)
                values["validation_loss"] = totals["validation_loss"] = held["loss"]
            values |= {"num_tokens": packed.num_tokens, "num_microbatches": len(packed.batches)}
            values["tokens_per_second_train"] = packed.num_tokens / run.timers.seconds("train")
            run.log(step, values)
            totals["loss"] = values["loss"]
            totals["wall_seconds"] = totals.get("wall_seconds", 0.0) + run.timers.last_step["seconds"]
            run.after_step(step, last, policy, {"position": position, "totals": totals})
        run.export(policy, architecture)
        run.finish({"sft_steps": last, **totals})
    finalize()
