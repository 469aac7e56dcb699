"""The groups of each step: sampled synchronously, dynamically, or prefetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from megarl.cluster.collectives import from_first_rank
from megarl.config.online import OnlineConfig
from megarl.data.order import order_of
from megarl.data.prompts import PromptDataset
from megarl.errors import UserError
from megarl.records import Group
from megarl.runs.training_run import TrainingRun
from megarl.sampling.dynamic_sampling import sample_unequal
from megarl.sampling.rollout_manager import RolloutManager, RolloutResult, usable
from megarl.sampling.rollout_prefetch import EventLoopThread, RolloutPrefetcher

GradedBatch = tuple[list[Group], dict[str, float]]


class RolloutBatches:
    """Every rank requests the same steps, in order; rank 0, which has ``rollouts``, gets the groups.

    Args:
        config: configuration of the run.
        run: for the console.
        rollouts: rank 0's.
        train: the training problems.
        step: the last step trained on.
        position: number of prompts drawn up to and including that step.
    """

    def __init__(
        self,
        config: OnlineConfig,
        run: TrainingRun,
        rollouts: RolloutManager | None,
        train: PromptDataset,
        *,
        step: int,
        position: int,
    ) -> None:
        self._config, self._run, self._rollouts, self._train = config, run, rollouts, train
        self._order = order_of(train, config.data.shuffle, config.run.seed)
        self._first, self._start = step + 1, position
        self.position = position
        """Prompts drawn for the collected steps. Prefetched batches do not count: a resumed run samples them
        again, so no prompt is lost and none is trained on twice."""
        self._finished: Counter[int] = Counter()
        self._loop: EventLoopThread | None = None
        self._prefetcher: RolloutPrefetcher[RolloutResult] | None = None
        if config.rollout.max_staleness and rollouts is not None:
            self._loop = EventLoopThread()
            rollouts.run_on(self._loop)
            self._prefetcher = RolloutPrefetcher(
                self._loop,
                self._prefetch,
                first=self._first,
                last=config.training.num_steps,
                max_staleness=config.rollout.max_staleness,
            )

    def collect(
        self, step: int, describe: Callable[[list[Group]], dict[str, float]] = lambda _: {}
    ) -> GradedBatch:
        """Return the graded groups of ``step`` on rank 0 (none elsewhere), and metrics on every rank.

        Every rank calls it. The metrics are those of sampling and those that ``describe`` returns on rank 0.

        Raises:
            UserError: on every rank, if rank 0's rollouts or ``describe`` failed.
        """
        groups: list[Group] = []

        def collect() -> tuple[dict[str, float], int]:
            found, metrics = self._collect(step)
            self._check_finite(step, found)
            groups.extend(found)
            return describe(groups) | metrics, self.position

        metrics, self.position = from_first_rank(collect)
        return groups, metrics

    def _check_finite(self, step: int, groups: list[Group]) -> None:
        """Stop or warn on NaN logprobs: the tokens they were drawn with are meaningless."""
        samples = [sample for group in groups for sample in group.samples]
        bad = [sample for sample in samples if np.isnan(sample.rollout_logprobs).any()]
        if not bad:
            return
        first = int(np.isnan(bad[0].rollout_logprobs).argmax())
        line = (
            f"step {step}: the engine's logprobs are NaN in {len(bad)} of {len(samples)} samples (first: "
            f"token {first + 1} of a response to prompt {bad[0].prompt_index})"
        )
        if self._config.run.on_non_finite == "stop":
            raise UserError(f"{line}: its numbers overflow, or its weights are not finite")
        self._run.console.warn(line)

    def _collect(self, step: int) -> GradedBatch:
        count = self._config.rollout.num_prompts_per_step
        if self._config.rollout.max_staleness:
            self.position += count
            return self._take_prefetched(step)
        if (most_batches := self._config.algorithm.most_batches) is None:
            return self._draw(step)
        counts: Counter[str] = Counter()

        def draw() -> list[Group]:
            groups, dropped = self._draw(step)
            counts.update(dropped)
            return groups

        groups, metrics = sample_unequal(draw, step=step, num_groups=count, max_batches=most_batches)
        return groups, dict(counts) | metrics

    def close(self) -> None:
        """Abort the prefetched batches."""
        if self._loop is not None:
            self._loop.close()

    def _settings(self, step: int, position: int) -> dict[str, Any]:
        rollout = self._config.rollout
        return {
            "prompts": [self._train[i] for i in self._order.batch(position, rollout.num_prompts_per_step)],
            "step": step,
            "generations": rollout.num_generations_per_prompt,
            "temperature": rollout.temperature,
            "top_k": rollout.top_k,
            "top_p": rollout.top_p,
            "max_new_tokens": rollout.max_new_tokens,
            "greedy_too": self._config.algorithm.samples_greedily,
        }

    def _draw(self, step: int) -> GradedBatch:
        """Sample and grade the next prompts synchronously."""
        assert self._rollouts is not None
        settings = self._settings(step, self.position)
        with self._run.console.progress("rollout", total=self._total) as advance:
            groups = self._rollouts.sample(**settings, advance=advance)
        self.position += self._config.rollout.num_prompts_per_step
        return usable(
            groups, self._rollouts.counts, self._run.console, smallest=self._config.algorithm.least_group
        )

    def _prefetch(self, step: int) -> Coroutine[Any, Any, RolloutResult]:
        assert self._rollouts is not None
        position = self._start + (step - self._first) * self._config.rollout.num_prompts_per_step

        def finished(number: int) -> None:
            self._finished[step] += number

        return self._rollouts.generate(**self._settings(step, position), advance=finished)

    def _take_prefetched(self, step: int) -> GradedBatch:
        """Return the groups of a batch started up to max_staleness steps ago."""
        assert self._prefetcher is not None
        console, shown = self._run.console, 0
        with self._run.timers("rollout"), console.progress("rollout", total=self._total) as advance:

            def show() -> None:
                nonlocal shown
                advance(self._finished[step] - shown)
                shown = self._finished[step]

            groups, counts, _ = self._prefetcher.take(step, show)
        return usable(groups, counts, console, smallest=self._config.algorithm.least_group)

    @property
    def _total(self) -> int:
        rollout, greedy = self._config.rollout, int(self._config.algorithm.samples_greedily)
        return rollout.num_prompts_per_step * (rollout.num_generations_per_prompt + greedy)
