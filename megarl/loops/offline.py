"""The loop of every job that trains on given examples: demonstrations or preference pairs.

One step, on every rank; ranks wait for each other only::

    training.batch_size rows -> batch -> [the objective's loss] -> packing -> forward/backward -> optimizer

Every rank reads the data and packs its microbatches; windows of a stream are read by the first. The loss is
an :class:`Objective`, one class per algorithm (sft.py, preference.py); held-out rows are evaluated every
training.validation_interval steps and after the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from megarl.batching.rank_microbatches import PackedStep
from megarl.cluster.collectives import from_first_rank
from megarl.cluster.variables import is_first_process
from megarl.config.preference import PreferenceRoot
from megarl.config.sft import SftConfig
from megarl.data.order import Ordered, held_out_rows, order_of
from megarl.loops.datasets import load_splits
from megarl.loops.model_files import check_fits, describe_model, memory_parts, read_model
from megarl.metrics.console import Console
from megarl.models.table import Architecture
from megarl.platform import spans
from megarl.records import PackedBatch, TrainBatch
from megarl.runs.training_run import TrainingRun
from megarl.simulate.shapes import active_elements
from megarl.trainer.build import finalize, initialize
from megarl.trainer.interface import RankContext, Trainer


class Examples(Ordered, Protocol):
    """A dataset whose rows are training sequences."""

    def batch(self, rows: Sequence[int]) -> TrainBatch:
        """Return the sequences of these rows, end to end."""
        ...


Data = TypeVar("Data", bound=Examples)
Loss = TypeVar("Loss")


class Objective(ABC, Generic[Data, Loss]):
    """The loss and metrics of one algorithm. Every rank calls every method, with the same rows."""

    trained: Trainer
    group_size = 1
    """Sequences per row; they share a microbatch."""
    headlines: tuple[str, ...] = ("loss",)
    """Metrics of the last step that summary.json reports."""

    @abstractmethod
    def loss(self, data: Data, rows: list[int], batch: TrainBatch) -> Loss:
        """Return the loss of these rows, whose sequences are ``batch``."""

    @abstractmethod
    def step(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """Take one optimizer step; return its metrics."""

    @abstractmethod
    def validate(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """Evaluate held-out rows; return metrics for the log and summary.json."""

    def notes(self) -> list[str]:
        """Return lines for the log before the first step."""
        return []

    def begin(self, rows: Callable[[], list[tuple[Data, list[int]]]]) -> None:
        """Prepare before a checkpoint is loaded.

        ``rows()`` returns all rows the run will use; not of a stream.
        """

    def state(self) -> dict[str, Any]:
        """Return the state a checkpoint holds apart from the weights."""
        return {}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError if the state of a checkpoint does not fit this run."""

    def summary(self) -> dict[str, Any]:
        """Return entries of summary.json apart from the headlines."""
        return {}


def run_offline(
    config: SftConfig | PreferenceRoot,
    kind: str,
    load: Callable[..., Data],
    make: Callable[[Any, TrainingRun, RankContext, Architecture], Objective[Data, Any]],
) -> None:
    """Train until the run's last step, resuming from the run directory's latest checkpoint."""
    console = Console(kind, enabled=is_first_process())
    with console.waiting("reading model and data"):
        architecture, tokenizer, longest = read_model(config)
        train, held_out = load_splits(load, config, tokenizer, longest)
        if train.stream is None:
            config = config.with_steps(len(train))
    with console.waiting("starting the trainer's processes"):
        context = initialize(config.parallel, config.run.seed, config.trainer)
        check_fits(config, architecture, context)
    if train.stream is not None:
        train.stream.share = from_first_rank
        with console.waiting("reading the first rows"):
            train.stream.window(0)
    with TrainingRun(config, kind, is_first=context.is_first) as run:
        run.tell(train, held_out)
        run.record_start(active_elements(architecture), memory_parts(config, architecture, context))
        with run.console.waiting("building the model"):
            objective = make(config, run, context, architecture)
        layers, *adapters = describe_model(context.platform.name, config, architecture)
        for line in [layers, *objective.notes()]:
            run.console.detail(line)
        if config.training.num_epochs is not None:
            run.console.note(_epochs_in_words(config, len(train)))
        for line in adapters:
            run.console.note(line)
        loop = OfflineLoop(config, run, objective, train, held_out)
        objective.begin(loop.rows)
        state = run.resume(objective.trained) or {"step": 0, "position": 0, "totals": {}}
        objective.check(state)
        loop.restore(state)
        totals = loop.run(state)
        run.export(objective.trained, objective.trained.architecture)
        run.finish({f"{kind}_steps": config.num_optimizer_steps, **totals, **objective.summary()})
    finalize(context)


def _epochs_in_words(config: SftConfig | PreferenceRoot, num_rows: int) -> str:
    training, steps = config.training, config.num_optimizer_steps
    of = f"{num_rows:,} {config.example}"
    return f"{training.num_epochs:g} epochs of {of} are {steps:,} steps of {training.batch_size}"


class OfflineLoop(Generic[Data]):
    """The training loop of one objective."""

    def __init__(
        self,
        config: SftConfig | PreferenceRoot,
        run: TrainingRun,
        objective: Objective[Data, Any],
        train: Data,
        held_out: Data | None,
    ) -> None:
        self.config, self.run_, self.objective = config, run, objective
        self.train, self.held_out = train, held_out
        self.num_steps = config.num_optimizer_steps
        self.order = order_of(train, config.data.shuffle, config.run.seed)
        self.validation: list[int] = []
        if held_out is not None:
            self.validation = held_out_rows(held_out, min(config.training.validation_size, len(held_out)))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint's state says."""
        if self.train.stream is not None and "stream" in state:
            self.train.stream.restore(state["stream"])

    def rows(self) -> list[tuple[Data, list[int]]]:
        """Return every row the run will see, each once."""
        training = self.config.training
        drawn = sorted(set(self.order.batch(0, self.num_steps * training.batch_size)))
        found = [(self.train, drawn)]
        return found if self.held_out is None else [*found, (self.held_out, self.validation)]

    def run(self, state: dict[str, Any]) -> dict[str, Any]:
        """Run from the state of the last finished step to the last step; return summary.json's entries."""
        run, objective, training = self.run_, self.objective, self.config.training
        position, totals = state["position"], dict(state["totals"])
        run.begin_steps()
        run.timers.start_step()
        for step in range(state["step"] + 1, self.num_steps + 1):
            packed, loss = self.take(self.train, self.order.batch(position, training.batch_size))
            position += training.batch_size
            with run.timers("train"):
                values = objective.step(packed.batches, loss)
            run.memory.measure(objective.trained)
            run.check(step, values)
            values |= packed.split_counts | {
                "num_tokens": packed.num_tokens,
                "num_microbatches": len(packed.batches),
                "tokens_per_second_train": packed.num_tokens / run.timers.seconds("train"),
            }
            if self.held_out is not None and self.validates(step):
                with spans.span("evaluation"):
                    packed, loss = self.take(self.held_out, self.validation)
                    found = objective.validate(packed.batches, loss)
                values |= found
                totals |= found
            run.log(step, values)
            totals |= {name: values[name] for name in objective.headlines}
            totals["wall_seconds"] = totals.get("wall_seconds", 0.0) + run.timers.last_step["seconds"]
            kept = {"position": position, "totals": totals, **objective.state()}
            if self.train.stream is not None:
                kept["stream"] = self.train.stream.place(position)
            run.after_step(step, self.num_steps, objective.trained, kept)
        run.console.end_steps()
        return totals

    def take(self, data: Data, rows: list[int]) -> tuple[PackedStep, Any]:
        """Return this rank's microbatches of the rows, and their loss."""
        batch = data.batch(rows)
        loss = self.objective.loss(data, rows, batch)
        return self.objective.trained.prepare(batch, "token", group_size=self.objective.group_size), loss

    def validates(self, step: int) -> bool:
        """Return True if held-out rows are evaluated after ``step``."""
        training = self.config.training
        at_interval = bool(training.validation_interval) and step % training.validation_interval == 0
        return at_interval or step == self.num_steps
