"""Run a GRPO learner on trainer ranks and record the inputs of its optimizer steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from megarl.records import Group, Prompt, Sample, token_ids

MAX_NEW_TOKENS = 12


def make_groups(seed: int = 0, prompts: int = 4, generations: int = 4) -> list[Group]:
    """Prompts of several lengths; right, wrong and truncated responses; arbitrary logprobs."""
    draw = random.Random(seed)
    groups = []
    for p in range(prompts):
        ids = [draw.randrange(250) for _ in range(3 + p)]
        samples = []
        for g in range(generations):
            length = MAX_NEW_TOKENS if (p + g) % 5 == 4 else draw.randint(2, MAX_NEW_TOKENS - 1)
            samples.append(
                Sample(
                    prompt_index=p,
                    prompt_ids=token_ids(ids),
                    response_ids=token_ids([draw.randrange(250) for _ in range(length)]),
                    rollout_logprobs=np.float32([draw.uniform(-6.5, -4.5) for _ in range(length)]),
                    policy_version=0,
                    finish_reason="length" if length == MAX_NEW_TOKENS else "stop",
                    reward=float(g % 2 or p == 1),
                    info={"rewards": {"correct": float(g % 2), "format": (p * g % 3) / 2}},
                )
            )
        groups.append(Group(Prompt(p, "", token_ids(ids)), samples))
    return groups


def with_greedy(group: Group) -> Group:
    """The group with a greedy response: its first one, worth a quarter, half, ... by the prompt."""
    first = replace(group.samples[0], reward=(group.prompt.index + 1) / 4)
    return Group(group.prompt, group.samples, first)


def fake_run() -> Any:
    """The parts of a TrainingRun that a learner uses."""
    from megarl.metrics.timers import PhaseTimers

    @contextmanager
    def progress(label: str, total: int) -> Any:
        yield lambda count: None

    warned: list[str] = []
    console = SimpleNamespace(progress=progress, warn=warned.append, warned=warned)
    return SimpleNamespace(timers=PhaseTimers(), console=console)


@contextmanager
def before_the_steps(look: Callable[[Any], None]) -> Iterator[None]:
    """Inside, ``look`` is called with the (mini-batch, share) pairs before the optimizer steps."""
    from megarl.loops import minibatches

    original = minibatches.epochs

    def look_first(run: Any, items: Any, num_epochs: int) -> Any:
        look(items)
        return original(run, items, num_epochs)

    with patch.object(minibatches, "epochs", look_first):
        yield


def make_config(model_dir: str, algorithm: dict[str, Any], parallel: dict[str, Any]) -> Any:
    from megarl.config.grpo import GrpoConfig

    source = {"source": "reasoning_gym", "task": "chain_sum"}
    return GrpoConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": model_dir},
            "parallel": parallel,
            "data": {"train": source},
            "rollout": {
                "num_prompts_per_step": 4,
                "num_generations_per_prompt": 4,
                "max_new_tokens": MAX_NEW_TOKENS,
            },
            "packing": {"max_tokens_per_microbatch": 64},
            "optimizer": {"lr": 1e-2, "adam_eps": 1e-3},
            "algorithm": algorithm,
            "training": {"num_steps": 4},
        }
    )


def learn(context: Any, model_dir: str, algorithm: dict[str, Any], parallel: dict[str, Any]) -> Any:
    """Take two steps; return all fields of the second's microbatches by (part, sequence, token)."""
    import torch

    from megarl.algorithms.grpo import GrpoLearner
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    config = make_config(model_dir, algorithm, parallel)
    policy = MegatronTrainer(
        context, load_architecture(model_dir), config.model, config.packing, config.optimizer, 8
    )
    policy.keep_reference()
    run = fake_run()
    learner = GrpoLearner(config, run, policy)
    greedy = algorithm.get("baseline") == "greedy"

    def own(seed: int) -> list[Group]:
        groups = make_groups(seed) if context.is_first else []  # no other rank has the samples
        return [with_greedy(group) for group in groups] if greedy else groups

    learner.learn(1, own(1))  # so that the policy is no longer the reference
    seen: dict[tuple[int, int, int], dict[str, float]] = {}

    def look(parts: Any) -> None:
        for number, (part, _) in enumerate(parts):
            for batch in part.batches:
                # Dropped tokens are no targets any more, and keep their logprobs.
                targets = batch.loss_mask if batch.old_logprobs is None else batch.old_logprobs
                for row in targets.nonzero().flatten().tolist():
                    at = (number, int(batch.sequence_ids[row]), int(batch.position_ids[row]) + 1)
                    seen[at] = {
                        name: float(value[row])
                        for name in (
                            *("advantages", "loss_mask", "loss_weights", "nll_weights"),
                            *("old_logprobs", "ref_logprobs", "rollout_logprobs"),
                        )
                        if isinstance(value := getattr(batch, name), torch.Tensor)
                    }

    groups = own(2)
    with before_the_steps(look):
        learned = learner.learn(2, groups)
    return {
        "seen": seen,
        "metrics": learned.metrics,
        "traced": learned.traced,
        "advantages": [[s.advantage for s in group.samples] for group in groups],
        "dropped": [[s.info.get("dropped") for s in group.samples] for group in groups],
        "warned": run.console.warned,
        "weights": {name: np.array(p.detach()) for name, p in policy.params.items()},
    }


def train(
    context: Any,
    model_dir: str,
    algorithm: dict[str, Any],
    parallel: dict[str, Any],
    steps: list[list[Group]],
) -> Any:
    """Take one step per batch of groups; return metrics of each, the packing of the last, and the weights."""
    from megarl.algorithms.grpo import GrpoLearner
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    config = make_config(model_dir, algorithm, parallel)
    policy = MegatronTrainer(
        context, load_architecture(model_dir), config.model, config.packing, config.optimizer, 8
    )
    policy.keep_reference()
    learner = GrpoLearner(config, fake_run(), policy)
    packed: list[dict[int, float]] = []

    def look(parts: Any) -> None:
        packed.clear()
        for part, _ in parts:
            rows = [(b, row) for b in part.batches for row in b.loss_mask.nonzero().flatten().tolist()]
            packed.append({int(b.sequence_ids[row]): float(b.loss_weights[row]) for b, row in rows})

    own = steps if context.is_first else [[] for _ in steps]  # no other rank has the samples
    with before_the_steps(look):
        metrics = [learner.learn(i + 1, groups).metrics for i, groups in enumerate(own)]
    return {
        "metrics": metrics,
        "packed": packed,
        "notes": learner.notes(),
        "advantages": [s.advantage for group in own[-1] for s in group.samples],
        "dropped": [s.info.get("dropped") is not None for group in own[-1] for s in group.samples],
        "weights": {name: np.array(p.detach()) for name, p in policy.params.items()},
    }


def collect_and_fail(context: Any) -> list[str]:
    """Collect twice, the second time failing on rank 0; return this rank's results and errors."""
    from megarl.errors import UserError
    from megarl.sampling.rollout_batches import RolloutBatches
    from megarl.sampling.rollout_manager import EnvironmentsFailedError, RolloutCounts

    class Failing:
        """Rollouts of rank 0."""

        def __init__(self) -> None:
            self.counts = RolloutCounts()

        def sample(self, prompts: list[Prompt], *, step: int, **_: Any) -> list[Group]:
            if step == 2:
                raise EnvironmentsFailedError("the environment failed 3 of 4 episodes")
            return make_groups(step)

    class Problems(list[Prompt]):
        is_mixture, parts, stream = False, (), None

    config = make_config("unused", {}, {})
    run, train = fake_run(), Problems(Prompt(i, "", [1]) for i in range(8))
    rollouts: Any = Failing() if context.is_first else None
    collector = RolloutBatches(config, run, rollouts, train, step=0, position=0)  # type: ignore[arg-type]
    groups, values = collector.collect(1, lambda found: {"samples": len(found)})
    told = [str(len(groups)), str(sorted(values.items())), str(collector.position)]
    try:
        collector.collect(2)
    except UserError as error:
        told += [type(error).__name__, str(error)]
    return told


def timeline(context: Any, model_dir: str, parallel: dict[str, Any], folder: Any) -> float:
    """Two steps whose loss is slow on rank 1; the timelines of the ranks go to ``folder``.

    Returns the seconds that this rank slept in the second step.
    """
    from megarl.algorithms.grpo import GrpoLearner
    from megarl.cluster.collectives import barrier
    from megarl.metrics.timeline import TimelineWriter
    from megarl.metrics.timers import PhaseTimers
    from megarl.models import load_architecture
    from megarl.platform import ranges, spans
    from megarl.trainer.megatron.trainer import MegatronTrainer
    from tests.losses import own

    config = make_config(model_dir, {"loss": "tests.losses.own:slow_on_rank_1"}, parallel)
    policy = MegatronTrainer(
        context, load_architecture(model_dir), config.model, config.packing, config.optimizer, 8
    )
    run = fake_run()
    run.timers = PhaseTimers(ranges.phase)
    learner = GrpoLearner(config, run, policy)
    writer = TimelineWriter(folder, context.rank, 2, after=-1)
    recorder = spans.Recorder()
    spans.record(recorder)
    try:
        for step in (1, 2):
            own.SLEPT.clear()
            barrier()
            recorder.start()
            learner.learn(step, make_groups(step) if context.is_first else [])
            writer.write(step, recorder.take().row())
    finally:
        spans.record(None)
        writer.close()
    return sum(own.SLEPT)
