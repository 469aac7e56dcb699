"""The loop of every algorithm that learns from its own samples.

One step, in data order (rank 0 drives the engine; every rank trains)::

    prompts -> rollout -> rewards -> [the algorithm's Learner] -> weights to the engine

consumes ``rollout.num_prompts_per_step`` prompts, produces one line of metrics and policy version ``step``,
and waits for the engine once, until the last response of the step has arrived. A :class:`Learner`, one file
per algorithm (grpo.py), turns graded groups into optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from megarl.batching.token_trace import TracedTokens
from megarl.cluster.collectives import barrier, broadcast, from_first_rank, gather, on_first_rank
from megarl.cluster.variables import is_first_process
from megarl.config.online import OnlineConfig
from megarl.data.prompts import PromptDataset
from megarl.data.tokenizer import TurnReader, stop_token_ids
from megarl.environments.remote import EnvironmentWorkers
from megarl.inference.interface import Engine
from megarl.inference.placement import TrainerPlace, this_rank
from megarl.loops.datasets import load_problems, load_splits
from megarl.loops.engine_setup import attach_weights, check_offload, start_engine, verify_weights
from megarl.loops.evaluation import evaluate, pick_problems
from megarl.loops.model_files import check_fits, describe_model, memory_parts, read_model
from megarl.loops.online_metrics import (
    describe_overlap,
    disagreement,
    engine_memory,
    first_samples,
    rollout_metrics,
    run_summary,
    sample_rows,
    staleness_metrics,
)
from megarl.losses.logprob_mismatch import LogprobMismatch
from megarl.metrics.console import Console
from megarl.metrics.rewards import count_rewards
from megarl.metrics.timers import PHASES
from megarl.models.table import Architecture
from megarl.platform import spans
from megarl.records import Group, Prompt
from megarl.runs.training_run import TrainingRun
from megarl.sampling.rollout_batches import RolloutBatches
from megarl.sampling.rollout_manager import RolloutManager, make_rollout_manager
from megarl.simulate.shapes import active_elements
from megarl.trainer.build import build_trainer, finalize, initialize
from megarl.trainer.interface import Checkpointable, Trainer
from megarl.weights.plan import Owner


@dataclass(slots=True)
class Learned:
    """Result of one step's optimizer steps: metrics (equal on every rank) and mismatch to the engine.

    ``metrics`` has at least num_tokens, the tokens of all sequences trained on. ``traced`` has, on rank 0,
    the tokens of some of the step's samples, by their number (groups end to end).
    """

    metrics: dict[str, float]
    mismatch: LogprobMismatch
    traced: dict[int, TracedTokens] = field(default_factory=dict)


class Learner(Protocol):
    """An algorithm: turns graded groups into optimizer steps. Every rank calls it; rank 0 has the groups."""

    @property
    def trained(self) -> Checkpointable:
        """The models in a checkpoint: the policy and any others trained with it."""
        ...

    def notes(self) -> list[str]:
        """Return log lines before the first step: what it computes and what it skips."""
        ...

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """Set every sample's ``advantage`` and take the optimizer steps; only rank 0 has ``groups``."""
        ...


MakeLearner = Callable[[Any, TrainingRun, Trainer], Learner]


def run_online(config: OnlineConfig, kind: str, make_learner: MakeLearner) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    console = Console(kind, enabled=is_first_process())
    with console.waiting("reading model and data"):
        architecture, tokenizer, longest = read_model(config)
        train, held_out = load_splits(load_problems, config, tokenizer, longest)
    with console.waiting("starting the trainer's processes"):
        context = initialize(config.parallel, config.run.seed, config.trainer)
        check_fits(config, architecture, context)
    if train.stream is not None:
        with console.waiting("reading the first rows"):
            on_first_rank(partial(train.stream.window, 0))
    check_offload(config.weights)
    with TrainingRun(config, kind, is_first=context.is_first) as run:
        run.tell(train, held_out)
        run.record_start(active_elements(architecture), memory_parts(config, architecture, context))
        ranks = gather(this_rank()) if config.rollout.engine.data_parallel_size > 1 else []
        rollout = on_first_rank(
            lambda: _start_rollout(config, run, architecture, tokenizer, longest, held_out, ranks)
        )
        with run.console.waiting("building the model"):
            policy = build_trainer(config, context, architecture, config.num_optimizer_steps)
            layers, *adapters = describe_model(context.platform.name, config, architecture)
            run.console.detail(layers)
            for line in adapters:
                run.console.note(line)
            if config.algorithm.needs_reference:
                policy.keep_reference()
            learner = make_learner(config, run, policy)
        state = run.resume(learner.trained) or {"step": 0, "position": 0, "totals": {}}
        owners = policy.weights.owners(config.weights.transport)
        rollouts = on_first_rank(
            lambda: (
                None
                if rollout is None
                else rollout.connect(config, run, architecture, owners, tokenizer, state["step"])
            )
        )
        engine, problems = (rollout.engine, rollout.problems) if rollout is not None else (None, [])
        OnlineLoop(config, run, policy, learner, rollouts, engine, train, problems, tokenizer).run(state)
        run.export(policy, architecture)
        if rollout is not None:
            with run.console.waiting("shutting down the engine"):
                rollout.shutdown()
    finalize(context)


@dataclass(frozen=True, slots=True)
class _Rollout:
    """Rank 0's side of the rollout: the engine, the environments' workers, and the held-out problems."""

    engine: Engine
    workers: EnvironmentWorkers
    problems: list[Prompt]

    def connect(
        self,
        config: OnlineConfig,
        run: TrainingRun,
        architecture: Architecture,
        owners: list[Owner],
        tokenizer: PreTrainedTokenizerBase,
        policy_version: int,
    ) -> RolloutManager:
        """Wait for the engine, attach it to the trainer's weights and return the rollouts."""
        with run.console.waiting("waiting for the engine"):
            for line in attach_weights(self.engine, architecture, owners, config.weights.transport):
                run.console.note(line)
        rollouts = make_rollout_manager(config, self.engine, self.workers, tokenizer, run.timers)
        if rollouts.note:
            run.console.note(rollouts.note)
        self.engine.sync(policy_version)
        return rollouts

    def shutdown(self) -> None:
        """Shut the engine and the workers down."""
        self.engine.shutdown()
        self.workers.shutdown()


def _start_rollout(
    config: OnlineConfig,
    run: TrainingRun,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    max_model_len: int,
    held_out: PromptDataset | None,
    ranks: list[TrainerPlace],
) -> _Rollout:
    """Start engine and workers in the background, while the trainer is built."""
    problems = []
    if held_out is not None and config.evaluates:
        problems = pick_problems(held_out, config.evaluation, run.console)
    with run.console.waiting("starting the engine's processes"):
        engine = start_engine(
            config.model,
            architecture,
            config.rollout.engine,
            config.weights,
            max_model_len=max_model_len,
            seed=config.run.seed,
            log_dir=run.directory.path,
            record_routing=config.rollout.router_replay,
            ranks=ranks,
            while_training=config.rollout.max_staleness > 0,
        )
    read = TurnReader(tokenizer, stop_token_ids(tokenizer, config.model.path))
    workers = EnvironmentWorkers(config.data.train, "data.train", config.rollout.environments, read)
    run.memory.watch("environments", workers.local_pids)
    return _Rollout(engine, workers, problems)


class OnlineLoop:
    """The training loop; ``rollouts``, ``engine`` and the held-out ``problems`` are rank 0's."""

    def __init__(
        self,
        config: OnlineConfig,
        run: TrainingRun,
        policy: Trainer,
        learner: Learner,
        rollouts: RolloutManager | None,
        engine: Engine | None,
        train: PromptDataset,
        problems: list[Prompt],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config, self.run_, self.policy, self.learner = config, run, policy, learner
        self.rollouts, self.engine, self.train, self.problems = rollouts, engine, train, problems
        self.tokenizer = tokenizer
        self.overlaps = config.rollout.max_staleness > 0

    def run(self, state: dict[str, Any]) -> None:
        """Run from the state of the last finished step to the last step."""
        collector = RolloutBatches(
            self.config,
            self.run_,
            self.rollouts,
            self.train,
            step=state["step"],
            position=state["position"],
        )
        try:
            self._run(state, collector)
        finally:
            collector.close()

    def _run(self, state: dict[str, Any], collector: RolloutBatches) -> None:
        config, run = self.config, self.run_
        for line in self.learner.notes():
            run.console.detail(line)
        curriculum, stream = self.train.curriculum, self.train.stream
        if stream is not None and "stream" in state:
            stream.restore(state["stream"])
        if curriculum is not None and "curriculum" in state:
            curriculum.load_state(state["curriculum"])
        totals: dict[str, float] = dict(state["totals"])
        last = config.training.num_steps
        earlier = totals.get("wall_seconds", 0.0)
        run.begin_steps()
        run.timers.start_step()
        if state["step"] == 0 and config.evaluates_after(0):
            found = self.evaluate(0)
            totals["accuracy_before"] = found["accuracy"]
            run.log(0, found)
        if self.overlaps:
            self.policy.before_update = self._pause_engine
            for line in describe_overlap(config, state["step"]):
                run.console.note(line)
        for step in range(state["step"] + 1, last + 1):
            self.give_memory_to("engine")
            groups, metrics = collector.collect(step, partial(self._describe, step))
            self.give_memory_to("trainer")
            learned = self.learner.learn(step, groups)
            run.memory.measure(self.learner.trained)
            values = metrics | learned.metrics | learned.mismatch.metrics()
            run.check(step, values)
            self._warn_on_mismatch(step, learned.mismatch)
            with run.timers("weights"):
                values |= self.sync_weights(step)
            if config.evaluates_after(step):
                values |= self.evaluate(step)
                totals["accuracy_after"] = values["accuracy"]
            if self.rollouts is not None:
                rewards = [float(s.reward or 0.0) for group in groups for s in group.samples]
                run.directory.append_rewards(step, count_rewards(rewards))
            if self.rollouts is not None and (count := config.logging.samples_per_step):
                chosen = first_samples(groups, count)
                self.rollouts.read(sample for _, sample in chosen)
                run.write_samples(step, sample_rows(step, chosen, self._decode, learned.traced))
            self._log(step, values, totals)
            totals["wall_seconds"] = earlier + run.seconds_so_far()
            kept = {"curriculum": curriculum.state()} if curriculum is not None else {}
            if stream is not None and run.is_first:
                kept["stream"] = stream.place(collector.position)
            run.after_step(
                step, last, self.learner.trained, {"position": collector.position, "totals": totals, **kept}
            )
        run.console.end_steps()
        run.finish(run_summary(run.kind, last, totals))

    def _describe(self, step: int, groups: list[Group]) -> dict[str, float]:
        """Return metrics of the groups of ``step``; update the curriculum, if any (rank 0)."""
        values, curriculum = rollout_metrics(groups), self.train.curriculum
        if curriculum is not None:
            values |= curriculum.metrics()
            for line in curriculum.observe(groups):
                self.run_.console.note(f"step {step}: {line}")
        return values | (staleness_metrics(groups, step - 1) if self.overlaps else {})

    def sync_weights(self, step: int) -> dict[str, float]:
        """Sync policy version ``step`` to the engine; return the bytes moved, and the engine's memory."""
        self.policy.weights.publish()
        self.give_memory_to("engine")
        report = self.engine.sync(step) if self.engine is not None else None
        if self.config.weights.verify == "checksum":
            verify_weights(self.engine, self.policy)
        if self.overlaps and self.engine is not None:
            self.engine.resume()
        values: dict[str, float] = {"weights_bytes_moved": 0, "policy_version": step}
        if report is not None:
            values["weights_bytes_moved"] = report.bytes_moved
            values |= engine_memory(report.memory)
        return values

    def _pause_engine(self) -> None:
        """Pause the engine, so no rank writes to shared parameters while it computes with them."""
        if self.engine is not None:
            self.engine.pause()
        broadcast(None)

    def give_memory_to(self, side: Literal["engine", "trainer"]) -> None:
        """Put the other side's ``weights.offload`` to sleep first, so both never hold all of theirs."""
        parts = self.config.weights.offload
        if side == "engine":
            self.learner.trained.sleep([part for part in parts if part != "kv_cache"])
        elif "kv_cache" in parts and self.engine is not None:
            self.engine.sleep()
        barrier()  # no rank allocates memory that another has not freed yet
        if side == "trainer":
            self.learner.trained.wake()
        elif "kv_cache" in parts and self.engine is not None:
            self.engine.wake()

    def evaluate(self, step: int) -> dict[str, float]:
        """Return accuracy and the metrics of evaluation.k on the held-out problems, on every rank."""

        def run() -> dict[str, float]:
            assert self.rollouts is not None
            settings = self.config.evaluation
            found = evaluate(
                self.rollouts,
                self.problems,
                settings,
                step=step,
                max_new_tokens=settings.max_new_tokens or self.config.rollout.max_new_tokens,
                seed=self.config.run.seed,
                console=self.run_.console,
            )
            self.run_.write_evaluation(step, found.rows(step))
            return found.metrics()

        with spans.span("evaluation"):
            return from_first_rank(run)

    def _decode(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id]))

    def _warn_on_mismatch(self, step: int, mismatch: LogprobMismatch) -> None:
        if line := disagreement(mismatch, self.config.model.dtype, self._decode):
            self.run_.console.warn(f"step {step}: {line}")

    def _log(self, step: int, values: dict[str, float], totals: dict[str, float]) -> None:
        # With overlap, sampling takes the whole step, not just the time the trainer waits for it.
        phases = PHASES if self.overlaps else ("rollout",)
        rollout_seconds = sum(self.run_.timers.seconds(phase) for phase in phases)
        tokens = values.pop("num_response_tokens")
        values["tokens_per_second_rollout"] = tokens / rollout_seconds if rollout_seconds else 0.0
        for name, value in (
            ("rollout_tokens", tokens),
            ("train_tokens", values["num_tokens"] * self.config.algorithm.num_epochs_per_batch),
            ("weights_bytes_moved", values["weights_bytes_moved"]),
        ):
            totals[name] = totals.get(name, 0) + value
        worst = max(totals.get("logprob_abs_diff_max", 0.0), values["logprob_abs_diff_max"])
        totals["logprob_abs_diff_max"] = worst
        self.run_.log(step, values)
        for phase, seconds in self.run_.timers.last_step.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
