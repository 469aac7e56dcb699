"""Settings shared by online runs (grpo, ppo, distill), which train on samples of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from megarl.config.data import PromptDataConfig
from megarl.config.evaluation import EvaluationConfig
from megarl.config.metric_names import ONLINE
from megarl.config.rollout import RolloutConfig, Sampling
from megarl.config.section import PositiveInt, Problems, Section, rule
from megarl.config.training import TrainingRoot


class WeightsConfig(Section):
    """Weight sync from trainer to engine, and memory offload."""

    verify: Literal["off", "checksum"] = "off"
    """checksum: after each weight sync, compare the checksums of all regions on both sides."""
    transport: Literal["auto", "shared_memory", "peer"] = "auto"
    """auto: shared memory on the engine's host, peer transfers between hosts; peer: always peer transfers."""
    offload: list[Literal["gradients", "optimizer", "kv_cache"]] = Field(default_factory=list)
    """Memory to free while unused: gradients, optimizer (GPU only), the engine's kv_cache."""
    keep_kv_cache: bool = False
    """Keep the KV cache across a weight sync, although older weights computed it."""


class OnlineTrainingConfig(Section):
    """Length of an online run."""

    num_steps: PositiveInt
    """Number of steps; each has one rollout batch."""


class OnlineAlgorithm(Section):
    """Base of the algorithm sections: properties that the online loop reads."""

    if TYPE_CHECKING:
        num_optimizer_steps_per_batch: int
        num_epochs_per_batch: int

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Optimizer steps per rollout batch, over all its epochs."""
        return self.num_optimizer_steps_per_batch * self.num_epochs_per_batch

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the loss or the reward."""
        return False

    @property
    def least_group(self) -> int:
        """Samples a group must have after failures, or it is dropped."""
        return 1

    @property
    def samples_greedily(self) -> bool:
        """Whether each group has a greedy response too."""
        return False

    @property
    def most_batches(self) -> int | None:
        """Maximum rollout batches per step under dynamic sampling; None: all groups are used."""
        return None

    @property
    def corrects_staleness(self) -> bool:
        """Whether the loss accounts for samples of older policy versions."""
        return False

    def lower_clip(self, low: float) -> Problems:
        """Rule: clip_low, ``low``, is below 1, so that the lower clip can act."""
        if low >= 1:
            reason = "must be below 1: ratios are positive, so a bound 1 - clip_low <= 0 never clips"
            yield "clip_low", f"{reason} (got {low})"


class OnlineConfig(TrainingRoot, Sampling):
    """Base of the online roots."""

    data: PromptDataConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: WeightsConfig = WeightsConfig()
    training: OnlineTrainingConfig

    metric_names: ClassVar[frozenset[str]] = ONLINE
    refused: ClassVar[dict[str, str]] = {}
    """Shared settings that the algorithm does not support -> reason."""
    if TYPE_CHECKING:  # each root has its own type
        algorithm: Any

    @rule
    def _of_torch(self) -> Problems:
        """`trainer.backend: torch` has no `rollout.router_replay` and no `cpu_offload` in online runs."""
        if self.trainer.backend == "torch":
            why = "the torch backend has none; trainer.backend = megatron has it"
            yield from self.unused("rollout.router_replay", why, "trainer.backend")
            why = "an engine on the same GPU reads the trainer's weights there"
            yield from self.unused("trainer.cpu_offload", why, "rollout.engine")

    @property
    def offloads(self) -> list[str]:
        """Memory to free while unused."""
        return list(self.weights.offload)

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates."""
        settings = self.evaluation
        asked = bool(settings.interval) or settings.at_start is not False or settings.at_end is not False
        return self.data.held_out is not None and asked

    def evaluates_after(self, step: int) -> bool:
        """Whether the run evaluates after ``step`` (0: before the first)."""
        settings = self.evaluation
        if self.data.held_out is None:
            return False
        if step == 0:
            return settings.at_start is not False
        at_end = step == self.training.num_steps and settings.at_end is not False
        return at_end or (settings.interval > 0 and step % settings.interval == 0)

    @property
    def longest_response(self) -> int:
        """Maximum tokens of a response, in training or evaluation."""
        return max(self.rollout.max_new_tokens, self.evaluation.max_new_tokens or 0)

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the policy in the run."""
        return int(self.training.num_steps * self.algorithm.optimizer_steps_per_batch)

    def measures(self, metric: str) -> bool:
        """Return whether a metric is computed on data.held_out."""
        return metric == "accuracy"

    def describe(self, model_config: dict[str, Any] | None) -> list[str]:
        """Return the lines of --dry-run=full on derived values."""
        rollout, algorithm = self.rollout, self.algorithm
        each = rollout.num_samples // algorithm.num_optimizer_steps_per_batch
        return [
            *super().describe(model_config),
            f"sequences per step: {rollout.num_samples} ({rollout.num_prompts_per_step} prompts x "
            f"{rollout.num_generations_per_prompt} samples)",
            f"samples per optimizer step: {each}, optimizer steps per rollout batch: "
            f"{algorithm.optimizer_steps_per_batch}",
            *self.describe_algorithm(),
            *rollout.engine.describe(),
        ]

    def describe_algorithm(self) -> list[str]:
        """Return the lines on forward passes that run or are skipped."""
        return []

    @rule
    def _refused(self) -> Problems:
        """Settings that this algorithm does not support keep their defaults."""
        for path, why in self.refused.items():
            yield from self.unused(path, why)

    @rule
    def _something_to_evaluate(self) -> Problems:
        """`evaluation.interval`, `at_start: true` and `at_end: true` need `data.held_out`."""
        asked = {f"evaluation.{name}": off for name, off in self.evaluation.asked_by.items()}
        if asked and self.data.held_out is None:
            instead = " ".join(f"{name}={off}" for name, off in asked.items())
            reason = f"missing, but required by {', '.join(asked)}: set it, or {instead}"
            yield "data.held_out", reason, *asked

    @rule
    def _param_gather_with_an_engine(self) -> Problems:
        """`parallel.overlap_param_gather` is not for online runs."""
        if self.parallel.overlap_param_gather:
            reason = "not for online runs: engines read the parameters right after each step"
            yield "parallel.overlap_param_gather", reason

    @rule
    def _prompts(self) -> Problems:
        """`rollout.num_prompts_per_step` is a multiple of `algorithm.num_optimizer_steps_per_batch`."""
        prompts, updates = self.rollout.num_prompts_per_step, self.algorithm.num_optimizer_steps_per_batch
        if prompts % updates:
            name = "algorithm.num_optimizer_steps_per_batch"
            reason = f"must be a multiple of {name} = {updates} (got {prompts})"
            yield "rollout.num_prompts_per_step", reason, name

    @rule
    def _enough_problems(self) -> Problems:
        """`rollout.num_prompts_per_step` must not exceed `data.train.size`."""
        prompts, size = self.rollout.num_prompts_per_step, getattr(self.data.train, "size", None)
        if size is not None and prompts > size:
            reason = f"more than the training set has, data.train.size = {size} (got {prompts})"
            yield "rollout.num_prompts_per_step", reason, "data.train.size"

    @rule
    def _ranks(self) -> Problems:
        """An optimizer step has at least one sample for every data-parallel rank."""
        samples, updates = self.rollout.num_samples, self.algorithm.num_optimizer_steps_per_batch
        if samples >= updates:
            yield from self.empty_ranks(
                "rollout.num_prompts_per_step", "an optimizer step", samples // updates
            )

    @rule
    def _room_for_a_prompt(self) -> Problems:
        """`rollout.max_new_tokens` and `evaluation.max_new_tokens` are below the longest sequence."""
        name = "max_sequence_length" if self.packing.max_sequence_length else "max_tokens_per_microbatch"
        limit = getattr(self.packing, name)
        for section in ("rollout", "evaluation"):
            length = getattr(self, section).max_new_tokens
            if length is not None and length >= limit:
                reason = f"leaves no room for a prompt within packing.{name} = {limit} (got {length})"
                yield f"{section}.max_new_tokens", reason, f"packing.{name}"
