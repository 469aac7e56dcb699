"""Group relative policy optimisation (GRPO: Shao et al. 2024, arXiv:2402.03300).

One step, in data order (rank 0 drives the engine; every rank trains)::

    prompts -> rollout -> rewards -> advantages -> packing -> [old, reference logprobs]
            -> forward/backward -> optimizer -> weights to the engine

consumes ``rollout.num_prompts_per_step`` prompts, produces one line of metrics and policy version
``step``, and waits for the engine once: when the last response of the step is in.
"""

from __future__ import annotations

from typing import Any, Literal

from megarl.advantages.group import group_advantages, zero_std_fraction
from megarl.algorithms.engines import attach_weights, check_offload, start_engine, verify_weights
from megarl.algorithms.evaluate import greedy, pick_problems
from megarl.algorithms.model import read_model
from megarl.algorithms.rollouts import Rollouts, accuracy, sample_row
from megarl.algorithms.run import Run
from megarl.config.derived import (
    evaluates,
    needs_old_logprobs,
    needs_reference,
    num_optimizer_steps,
    without_effect,
)
from megarl.config.schema import GrpoConfig
from megarl.data.order import PromptOrder
from megarl.data.prompts import PromptDataset, load_prompts
from megarl.data.tokenizer import stop_token_ids
from megarl.environments import make
from megarl.losses.agreement import Agreement
from megarl.losses.policy import PolicyLoss, options_of
from megarl.metrics.checks import DIFFERENCE_LIMITS
from megarl.metrics.timers import PHASES
from megarl.records import Group, PackedBatch, Prompt, Sample, Sequence
from megarl.trainer.megatron.initialize import finalize, initialize
from megarl.trainer.policy import Policy, broadcast


def run_grpo(config: GrpoConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    architecture, tokenizer, longest = read_model(config)
    room = longest - max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
    train = load_prompts(config.data, tokenizer, max_prompt_tokens=room, split="train")
    held_out = (
        load_prompts(config.data, tokenizer, max_prompt_tokens=room, split="held_out")
        if config.data.held_out is not None
        else None
    )
    context = initialize(config.parallel, config.run.seed)
    check_offload(config.weights)
    from megarl.trainer.megatron.policy import MegatronPolicy

    with Run(config, "grpo", is_first=context.is_first) as run:
        engine, problems = None, []
        if context.is_first:
            if held_out is not None and evaluates(config.evaluation):
                problems = pick_problems(held_out, config.evaluation.num_prompts, run.console)
            engine = start_engine(
                config.model,
                config.rollout.engine,
                config.weights,
                max_model_len=longest,
                seed=config.run.seed,
                log_dir=run.directory.path,
            )
        total = num_optimizer_steps(config)
        policy = MegatronPolicy(
            context,
            architecture,
            config.model,
            config.packing,
            config.optimizer,
            total,
            check_numerics=config.debug.check_numerics,
        )
        if needs_reference(config.algorithm):
            policy.keep_reference()
        state = run.resume(policy) or {"step": 0, "position": 0, "totals": {}}
        owners = policy.weight_owners(config.weights.transport)
        rollouts = None
        if engine is not None:
            with run.console.waiting("vLLM engine"):
                for line in attach_weights(engine, architecture, owners, config.weights.transport):
                    run.console.note(line)
            environment = make(config.data.train)
            stops = tuple(stop_token_ids(tokenizer, config.model.path))
            rollouts = Rollouts(engine, environment, tokenizer, stops, run.timers, config.run.seed)
            engine.sync(state["step"])
        loop = _GrpoLoop(config, run, policy, rollouts, engine, train, problems, tokenizer)
        loop.run(state)
        run.export(policy, architecture)
        if engine is not None:
            engine.shutdown()
    finalize()


class _GrpoLoop:
    """The loop with all it drives; ``rollouts``, ``engine`` and the held-out ``problems`` are rank 0's."""

    def __init__(
        self,
        config: GrpoConfig,
        run: Run,
        policy: Policy,
        rollouts: Rollouts | None,
        engine: Any,
        train: PromptDataset,
        problems: list[Prompt],
        tokenizer: Any,
    ) -> None:
        self.config, self.run_, self.policy, self.rollouts = config, run, policy, rollouts
        self.engine, self.train, self.problems, self.tokenizer = engine, train, problems, tokenizer
        algorithm = config.algorithm
        self.loss = PolicyLoss(options_of(algorithm), config.debug.check_numerics)
        self.needs_old = needs_old_logprobs(algorithm)
        self.needs_reference = needs_reference(algorithm)

    def run(self, state: dict[str, Any]) -> None:
        """From the state of the last finished step to the last step."""
        config, run = self.config, self.run_
        run.console.note(
            "old logprobs: "
            + ("one forward pass per batch" if self.needs_old else "skipped (one on-policy optimizer step)")
            + "; reference logprobs: "
            + ("one forward pass per batch" if self.needs_reference else "skipped (kl_coef = 0)")
        )
        for line in without_effect(config.algorithm):
            run.console.warn(line)
        order = PromptOrder(len(self.train), config.data.shuffle, config.run.seed)
        totals: dict[str, float] = dict(state["totals"])
        position, last = state["position"], config.training.num_steps
        earlier = totals.get("wall_seconds", 0.0)
        run.timers.start_step()
        if state["step"] == 0 and config.evaluation.at_start:
            totals["accuracy_before"] = self.evaluate(0)
            run.log(0, {"accuracy": totals["accuracy_before"]})
        for step in range(state["step"] + 1, last + 1):
            indices = order.batch(position, config.rollout.num_prompts_per_step)
            position += len(indices)
            groups, values = self.rollout(step, indices)
            values |= self.learn(step, groups)
            with run.timers("weights"):
                values |= self.hand_over(step)
            interval = config.evaluation.interval
            if (interval and step % interval == 0) or (step == last and config.evaluation.at_end):
                values["accuracy"] = totals["accuracy_after"] = self.evaluate(step)
            self.write_samples(step, groups)
            self._log(step, values, totals)
            totals["wall_seconds"] = earlier + run.seconds_so_far()
            run.after_step(step, last, self.policy, {"position": position, "totals": totals})
        run.finish(self.summary(totals))

    def rollout(self, step: int, indices: list[int]) -> tuple[list[Group], dict[str, float]]:
        """Sample, grade and give advantages: the same groups on every rank."""
        config, groups = self.config, None
        self.give_memory_to("engine")
        if self.rollouts is not None:
            prompts = [self.train[i] for i in indices]
            total = len(prompts) * config.rollout.num_generations_per_prompt
            with self.run_.console.progress("rollout", total=total) as advance:
                groups = self.rollouts.sample(
                    prompts,
                    step=step,
                    generations=config.rollout.num_generations_per_prompt,
                    temperature=config.rollout.temperature,
                    top_k=config.rollout.top_k,
                    top_p=config.rollout.top_p,
                    max_new_tokens=config.rollout.max_new_tokens,
                    advance=advance,
                )
        shared: list[Group] = broadcast(groups)
        rewards = [[float(s.reward or 0.0) for s in group.samples] for group in shared]
        advantages = group_advantages(
            rewards, baseline=config.algorithm.baseline, normalize_std=config.algorithm.normalize_std
        )
        for group, values in zip(shared, advantages, strict=True):
            for sample, advantage in zip(group.samples, values, strict=True):
                sample.advantage = advantage
        return shared, _rollout_metrics(shared, rewards)

    def learn(self, step: int, groups: list[Group]) -> dict[str, float]:
        """Pack, fill the logprobs that are needed, and take the optimizer steps of this batch."""
        algorithm, rollout = self.config.algorithm, self.config.rollout
        self.give_memory_to("trainer")
        temperature = rollout.temperature
        share = len(groups) // algorithm.num_optimizer_steps_per_batch
        samples = [
            [sample for group in groups[i : i + share] for sample in group.samples]
            for i in range(0, len(groups), share)
        ]
        minibatches: list[list[PackedBatch]] = []
        computed = 0
        for part in samples:
            sequences = [to_sequence(s) for s in part]
            minibatches.append(self.policy.prepare(sequences, algorithm.loss_aggregation))
            computed += self.policy.num_computed_tokens
        agreement = Agreement()
        with self.run_.timers("logprobs"):
            for batches in minibatches if self.needs_old else []:
                agreement = agreement + self.policy.fill_logprobs(
                    batches, "old_logprobs", temperature=temperature
                )
            if self.needs_reference:
                with self.policy.reference():
                    for batches in minibatches:
                        self.policy.fill_logprobs(batches, "ref_logprobs", temperature=temperature)
        results = []
        total = algorithm.num_epochs_per_batch * len(minibatches)
        with self.run_.timers("train"), self.run_.console.progress("train", total=total) as advance:
            for _ in range(algorithm.num_epochs_per_batch):
                for batches in minibatches:
                    results.append(
                        self.policy.train_step(
                            batches,
                            self.loss,
                            temperature=temperature,
                            top_k=rollout.top_k,
                            top_p=rollout.top_p,
                        )
                    )
                    advance(1)
        if not self.needs_old:  # these very weights drew the samples
            agreement = results[0].agreement
        self._check_agreement(step, agreement, [s for part in samples for s in part])
        values = {name: sum(r.metrics[name] for r in results) / len(results) for name in results[0].metrics}
        values["lr"] = results[-1].metrics["lr"]
        values["num_microbatches"] = sum(len(batches) for batches in minibatches)
        tokens = sum(s.num_tokens for part in samples for s in part)
        values["num_tokens"], values["num_computed_tokens"] = tokens, computed
        values["tokens_per_second_train"] = (
            tokens * algorithm.num_epochs_per_batch / self.run_.timers.seconds("train")
        )
        return values | agreement.metrics()

    def hand_over(self, step: int) -> dict[str, float]:
        """The engine gets policy version ``step``; counts the bytes that had to move."""
        self.give_memory_to("engine")
        moved = self.engine.sync(step).bytes_moved if self.engine is not None else 0
        if self.config.weights.verify == "checksum":
            verify_weights(self.engine, self.policy)
        return {"weights_bytes_moved": moved, "policy_version": step}

    def give_memory_to(self, side: Literal["engine", "trainer"]) -> None:
        """Let the other side's ``weights.offload`` sleep first, so that both never hold all of theirs."""
        parts = self.config.weights.offload
        if side == "engine":
            self.policy.sleep([part for part in parts if part != "kv_cache"])
        elif "kv_cache" in parts and self.engine is not None:
            self.engine.sleep()
        broadcast(None)  # no rank takes memory that another has not given up yet
        if side == "trainer":
            self.policy.wake()
        elif "kv_cache" in parts and self.engine is not None:
            self.engine.wake()

    def evaluate(self, step: int) -> float:
        """Greedy accuracy on the held-out problems (every rank gets it)."""
        result = 0.0
        if self.rollouts is not None:
            config = self.config
            longest = config.evaluation.max_new_tokens or config.rollout.max_new_tokens
            groups = greedy(self.rollouts, self.problems, step, longest, self.run_.console)
            result = accuracy(groups)
        return float(broadcast(result))

    def write_samples(self, step: int, groups: list[Group]) -> None:
        """Keep the first ``logging.samples_per_step`` samples for people (whole groups first)."""
        count = self.config.logging.samples_per_step
        if not self.run_.is_first or not count:
            return
        rows = []
        for group in groups:
            for sample in group.samples:
                rows.append(
                    sample_row(step, group, sample)
                    | {
                        "advantage": sample.advantage,
                        "policy_version": sample.policy_version,
                        "num_response_tokens": len(sample.response_ids),
                        "info": sample.info,
                        "rollout_logprobs": [round(v, 5) for v in sample.rollout_logprobs],
                        "response_tokens": [self.tokenizer.decode([i]) for i in sample.response_ids],
                    }
                )
        self.run_.directory.write_samples(step, rows[:count])

    def _check_agreement(self, step: int, agreement: Agreement, samples: list[Sample]) -> None:
        bound = DIFFERENCE_LIMITS[self.config.model.dtype]
        worst = agreement.worst
        if worst is None or worst.difference <= bound:
            return
        token = f"token {worst.label} {self.tokenizer.decode([worst.label])!r}"
        self.run_.console.warn(
            f"step {step}: engine and trainer differ by {worst.difference:.2e} (above {bound:g}) on {token}: "
            f"trainer {worst.trainer_logprob:.5f}, engine {worst.rollout_logprob:.5f}. They are not the same "
            "policy: compare their types and weights."
        )

    def _log(self, step: int, values: dict[str, float], totals: dict[str, float]) -> None:
        rollout_seconds = self.run_.timers.seconds("rollout")
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

    def summary(self, totals: dict[str, float]) -> dict[str, Any]:
        """What summary.json says about the run, its earlier parts included when it was resumed."""
        seconds = {phase: totals.get(f"seconds_{phase}", 0.0) for phase in PHASES}
        wall = totals.get("wall_seconds", 0.0)  # start-up and evaluation included, under "other"
        seconds["other"] = wall - sum(seconds[phase] for phase in PHASES if phase != "other")
        return {
            "accuracy_before": totals.get("accuracy_before"),
            "accuracy_after": totals.get("accuracy_after"),
            "grpo_steps": self.config.training.num_steps,
            "wall_seconds": wall,
            "phase_seconds": seconds,
            "tokens_per_second": {
                "rollout": totals.get("rollout_tokens", 0) / seconds["rollout"]
                if seconds["rollout"]
                else 0.0,
                "train": totals.get("train_tokens", 0) / seconds["train"] if seconds["train"] else 0.0,
            },
            "weights_bytes_moved": int(totals.get("weights_bytes_moved", 0)),
            "logprob_abs_diff_max": totals.get("logprob_abs_diff_max", 0.0),
        }


def to_sequence(sample: Sample) -> Sequence:
    """A graded sample as a training sequence: the response tokens are the targets."""
    prompt = len(sample.prompt_ids)
    assert sample.advantage is not None
    return Sequence(
        token_ids=sample.prompt_ids + sample.response_ids,
        loss_mask=[0] * prompt + [1] * len(sample.response_ids),
        advantage=sample.advantage,
        rollout_logprobs=[0.0] * prompt + sample.rollout_logprobs,
        num_prompt_tokens=prompt,
    )


def _rollout_metrics(groups: list[Group], rewards: list[list[float]]) -> dict[str, float]:
    flat = [reward for group in rewards for reward in group]
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.response_ids) for sample in samples]
    mean = sum(flat) / len(flat)
    return {
        "reward_mean": mean,
        "reward_std": (sum((r - mean) ** 2 for r in flat) / len(flat)) ** 0.5,
        "reward_min": min(flat),
        "reward_max": max(flat),
        "zero_std_groups_fraction": zero_std_fraction(rewards),
        "response_length_mean": sum(lengths) / len(lengths),
        "response_length_max": max(lengths),
        "truncated_fraction": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "num_response_tokens": sum(lengths),
    }
