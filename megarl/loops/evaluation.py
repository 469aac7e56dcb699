"""Accuracy, pass@k and cons@k on held-out problems, within a run and as `megarl eval` of a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megarl.config.evaluate import EvalConfig
from megarl.config.evaluation import EvaluationSizeConfig
from megarl.config.load import public
from megarl.config.model import ModelConfig, is_checkpoint
from megarl.config.parallel import ParallelConfig
from megarl.data.prompts import PromptDataset
from megarl.data.tokenizer import TurnReader, stop_token_ids
from megarl.environments.remote import EnvironmentWorkers
from megarl.errors import UserError
from megarl.inference.placement import this_machine
from megarl.loops.datasets import load_problems
from megarl.loops.engine_setup import attach_weights, start_engine
from megarl.loops.model_files import read_model
from megarl.loops.start_weights import convert_start, with_converted_path
from megarl.metrics.console import Console
from megarl.metrics.scores import Scores, is_correct, score, score_by_category, table, vote_of
from megarl.metrics.timers import PhaseTimers
from megarl.models.any_family import has_engine_table
from megarl.models.table import Architecture
from megarl.records import Group, Prompt
from megarl.run_directory import RunDirectory
from megarl.sampling.rollout_manager import RolloutManager, sample_row
from megarl.trainer.build import build_frozen, finalize, initialize
from megarl.trainer.interface import RankContext, Trainer
from megarl.weights.file_owner import FileOwner


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Graded answers and their scores."""

    groups: list[Group]
    total: Scores
    categories: dict[str, Scores]  # empty if problems have none

    def metrics(self) -> dict[str, float]:
        """Return the scores for a line of metrics.jsonl."""
        return {"accuracy": self.total.accuracy, **self.total.values}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return one row per answer, as saved."""
        rows = []
        for group in self.groups:
            for number, sample in enumerate(group.samples):
                vote = vote_of(sample)
                rows.append(
                    sample_row(step, group, sample)
                    | {
                        "sample": number,
                        "correct": is_correct(sample),
                        "vote": None if vote is None else vote[0],
                        "category": group.prompt.metadata.get("category"),
                        "info": sample.info,
                    }
                )
        return rows


def pick_problems(held_out: PromptDataset, settings: EvaluationSizeConfig, console: Console) -> list[Prompt]:
    """Return the first ``num_prompts`` held-out problems (null: all) that do not occur in training."""
    with console.waiting("comparison of held-out and training problems"):
        unseen = held_out.unseen
    if unseen is None:
        why = held_out.not_compared
        console.warn(f"held-out problems were not checked against the training problems: {why}")
        unseen = list(range(len(held_out)))
    if left_out := len(held_out) - len(unseen):
        console.note(f"{left_out} of {len(held_out)} held-out problems also occur in training: left out")
    count = settings.num_prompts
    if not unseen or (count is not None and len(unseen) < count):
        wanted = "some" if count is None else str(count)
        raise UserError(
            f"evaluation.num_prompts: {wanted} problems requested, {len(unseen)} of {len(held_out)} held-out "
            "problems do not occur in training; enlarge data.held_out, or set it to null for all of them"
        )
    chosen = unseen[:count]
    if held_out.is_mixture and count is not None:  # sources are end to end: take some of each
        chosen = [unseen[i * len(unseen) // count] for i in range(count)]
    problems = [held_out[i] for i in chosen]
    if settings.category_field is None:
        return problems
    return [_with_category(problem, settings.category_field) for problem in problems]


def _with_category(problem: Prompt, field: str) -> Prompt:
    value: Any = problem.metadata.get("entry")
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"evaluation.category_field: problem {problem.index} has no field {field!r}")
        value = value[name]
    return dataclasses.replace(problem, metadata={**problem.metadata, "category": str(value)})


def evaluate(
    rollouts: RolloutManager,
    problems: list[Prompt],
    settings: EvaluationSizeConfig,
    *,
    step: int,
    max_new_tokens: int,
    seed: int,
    console: Console,
) -> Evaluation:
    """Answer every problem under ``settings`` and score the answers."""
    n = settings.num_samples_per_prompt
    with console.progress("evaluation", total=len(problems) * n) as advance:
        groups = rollouts.sample(
            problems,
            step=step,
            generations=n,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=max_new_tokens,
            advance=advance,
            phase="other",
        )
    rollouts.read(sample for group in groups for sample in group.samples)
    if rollouts.counts.num_dropped:
        console.warn(
            f"{rollouts.counts.num_dropped} of {len(problems) * n} answers could not be graded, left out;"
            f" the last: {rollouts.counts.reason}"
        )
    draws = settings.consensus_draws if settings.consensus == "sampled" else 0
    total = score(groups, settings.k, consensus_draws=draws, seed=seed)
    categories = score_by_category(groups, settings.k, consensus_draws=draws, seed=seed)
    kind = "greedy accuracy" if settings.temperature == 0 else f"accuracy (mean@{n})"
    extra = "".join(f", {name.replace('_at_', '@')} {value:.1%}" for name, value in total.values.items())
    console.detail(f"step {step}: {kind} {total.accuracy:.1%}{extra} on {len(problems)} held-out problems")
    return Evaluation(groups, total, categories)


def run_eval(config: EvalConfig) -> None:
    """Evaluate ``model.path`` with an engine; writes summary.json and samples/step_0.jsonl."""
    console, timers = Console("eval"), PhaseTimers()
    with RunDirectory(config.run.dir) as directory:
        directory.open(public(config), config.model_dump(mode="json", exclude_defaults=True))
        with console.waiting("reading model and problems"):
            if is_checkpoint(config.model.path):
                if line := convert_start(config.model.path, directory.path):
                    console.note(line)
                config = with_converted_path(config)
            architecture, tokenizer, longest = read_model(config)
            held_out = load_problems(config, tokenizer, longest, "held_out")
        for line in (line for report in held_out.reports for line in report.lines()):
            console.note(line)
        problems = pick_problems(held_out, config.evaluation, console)
        with console.waiting("starting the engine's processes"):
            engine = start_engine(
                config.model,
                architecture,
                config.rollout.engine,
                max_model_len=longest,
                seed=config.run.seed,
                log_dir=directory.path,
                ranks=[this_machine()],
            )
        stops = tuple(stop_token_ids(tokenizer, config.model.path))
        workers = EnvironmentWorkers(
            config.data.held_out,
            "data.held_out",
            config.rollout.environments,
            TurnReader(tokenizer, stops),
        )
        context = initialize(ParallelConfig(), config.run.seed)
        weights = CheckpointWeights(context, architecture, config.model)
        with console.waiting("waiting for the engine"):
            attach_weights(engine, architecture, weights.owners)
        engine.sync(0)
        rollouts = RolloutManager(
            engine,
            workers.wait_ready(),
            tokenizer,
            stops,
            timers,
            config.run.seed,
            config.rollout.environments,
            chat_template=bool(config.data.format.chat_template),
        )
        if rollouts.note:
            console.note(rollouts.note)
        found = evaluate(
            rollouts,
            problems,
            config.evaluation,
            step=0,
            max_new_tokens=config.longest_response,
            seed=config.run.seed,
            console=console,
        )
        _write(directory, found, timers.end_step()["seconds"], console)
        with console.waiting("shutting down the engine"):
            engine.shutdown()
            workers.shutdown()
    finalize(context)


class CheckpointWeights:
    """The weights of ``model``'s files for an engine without a trainer. They last as long as this object: an
    engine maps them when it attaches, and again when it is replaced.

    Attributes:
        owners: as :func:`megarl.loops.engine_setup.attach_weights` takes them.
    """

    def __init__(self, context: RankContext, architecture: Architecture, model: ModelConfig) -> None:
        self._holder: Trainer | FileOwner
        if has_engine_table(architecture):
            self._holder = trainer = build_frozen(context, architecture, model)
            self.owners = trainer.weights.owners()
        else:
            self._holder = files = FileOwner(model.path, model.dtype)
            self.owners = [files.owner()]


def _write(directory: RunDirectory, found: Evaluation, seconds: float, console: Console) -> None:
    directory.write_samples(0, found.rows(0))
    summary = found.total.summary() | {"wall_seconds": seconds}
    if found.categories:
        summary["categories"] = {name: scores.summary() for name, scores in found.categories.items()}
    directory.write_summary(summary)
    for line in table(found.total, found.categories):
        console.note(line)
    console.note(
        f"{found.total.num_samples} answers to {found.total.num_prompts} problems "
        f"(95% intervals: {found.total.interval_method}): {directory.samples_path / 'step_0.jsonl'}"
    )
