"""What runs that learn from their own samples have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from megarl.config.data import PromptDataConfig
from megarl.config.evaluation import EvaluationConfig
from megarl.config.rollout import RolloutConfig, Sampling
from megarl.config.section import PositiveInt, Problems, Section, rule
from megarl.config.training import TrainingRoot


class WeightsConfig(Section):
    """How the engine gets the trainer's weights."""

    verify: Literal["off", "checksum"] = "off"
    """checksum: after every weight sync, compare checksums of every region on both sides."""
    transport: Literal["auto", "shared_memory", "peer"] = "auto"
    """auto maps memory of the engine's host and asks other hosts; peer asks all, as if on other hosts."""
    offload: list[Literal["gradients", "optimizer", "kv_cache"]] = Field(default_factory=list)
    """What gives up its memory while unused: gradients, optimizer (GPU only) and the engine's kv_cache."""
    keep_kv_cache: bool = False
    """Keep cached keys and values over a weight sync, though older weights made them."""


class OnlineTrainingConfig(Section):
    """Length of a run that learns from its own samples."""

    num_steps: PositiveInt
    """Rollout batches."""


class OnlineAlgorithm(Section):
    """Base of the algorithms' sections, and what the loop asks of them."""

    if TYPE_CHECKING:
        num_optimizer_steps_per_batch: int
        num_epochs_per_batch: int

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Optimizer steps taken on one rollout batch, over all its epochs."""
        return self.num_optimizer_steps_per_batch * self.num_epochs_per_batch

    @property
    def needs_reference(self) -> bool:
        """Whether reference logprobs enter the loss or the reward."""
        return False

    @property
    def least_group(self) -> int:
        """Samples a prompt must have left, after failures, for its group to be used."""
        return 1

    @property
    def most_batches(self) -> int | None:
        """Rollout batches that may be drawn until a step has groups with unequal rewards; None takes any."""
        return None

    @property
    def corrects_staleness(self) -> bool:
        """Whether the loss knows that older weights drew a sample."""
        return False

    def lower_clip(self, low: float) -> Problems:
        """Rule: ratios below 1 - ``low``, clip_low, can occur."""
        if low >= 1:
            reason = "must be below 1: ratios are positive, so 1 - clip_low <= 0 never clips"
            yield "clip_low", f"{reason} (got {low})"


class OnlineConfig(TrainingRoot, Sampling):
    """What runs that learn from their own samples have in common."""

    data: PromptDataConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: WeightsConfig = WeightsConfig()
    training: OnlineTrainingConfig

    refused: ClassVar[dict[str, str]] = {}
    """Settings of the shared sections that an algorithm cannot have, and why."""
    if TYPE_CHECKING:  # every algorithm has its own
        algorithm: Any

    @rule
    def _of_torch(self) -> Problems:
        if self.trainer.backend == "torch":
            why = "the torch backend has none; trainer.backend = megatron has it"
            yield from self.unused("rollout.router_replay", why, "trainer.backend")
            why = "an engine on the same GPU reads the trainer's weights there"
            yield from self.unused("trainer.cpu_offload", why, "rollout.engine")

    @property
    def offloads(self) -> list[str]:
        """What gives up its memory while unused."""
        return list(self.weights.offload)

    @property
    def evaluates(self) -> bool:
        """Whether the run ever evaluates."""
        return bool(self.evaluation.asked_by)

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response, of training or of an evaluation."""
        return max(self.rollout.max_new_tokens, self.evaluation.max_new_tokens or 0)

    @property
    def num_optimizer_steps(self) -> int:
        """The (policy's) optimizer steps of the whole run."""
        return int(self.training.num_steps * self.algorithm.optimizer_steps_per_batch)

    def measures(self, metric: str) -> bool:
        """Whether a metric comes from data.held_out."""
        return metric == "accuracy"

    def describe(self, model_config: dict[str, Any] | None) -> list[str]:
        """Lines for --dry-run: what the configuration amounts to."""
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
        """Of them, which passes the algorithm makes and skips."""
        return []

    @rule
    def _refused(self) -> Problems:
        for path, why in self.refused.items():
            yield from self.unused(path, why)

    @rule
    def _something_to_evaluate(self) -> Problems:
        asked = [f"evaluation.{name}" for name in self.evaluation.asked_by]
        if asked and self.data.held_out is None:
            yield "data.held_out", f"missing, but evaluation asks for it by {', '.join(asked)}", *asked

    @rule
    def _param_gather_with_an_engine(self) -> Problems:
        if self.parallel.overlap_param_gather:
            reason = "not with an engine: engines read the parameters right after every step"
            yield "parallel.overlap_param_gather", reason

    @rule
    def _prompts(self) -> Problems:
        prompts, updates = self.rollout.num_prompts_per_step, self.algorithm.num_optimizer_steps_per_batch
        if prompts % updates:
            name = "algorithm.num_optimizer_steps_per_batch"
            reason = f"must be a multiple of {name} = {updates} (got {prompts})"
            yield "rollout.num_prompts_per_step", reason, name

    @rule
    def _enough_problems(self) -> Problems:
        prompts, size = self.rollout.num_prompts_per_step, getattr(self.data.train, "size", None)
        if size is not None and prompts > size:
            reason = f"more than the training set has, data.train.size = {size} (got {prompts})"
            yield "rollout.num_prompts_per_step", reason, "data.train.size"

    @rule
    def _ranks(self) -> Problems:
        samples, updates = self.rollout.num_samples, self.algorithm.num_optimizer_steps_per_batch
        if samples >= updates:
            yield from self.empty_ranks(
                "rollout.num_prompts_per_step", "an optimizer step", samples // updates
            )

    @rule
    def _room_for_a_prompt(self) -> Problems:
        name = "max_sequence_length" if self.packing.max_sequence_length else "max_tokens_per_microbatch"
        limit = getattr(self.packing, name)
        for section in ("rollout", "evaluation"):
            length = getattr(self, section).max_new_tokens
            if length is not None and length >= limit:
                reason = f"leaves no room for a prompt within packing.{name} = {limit} (got {length})"
                yield f"{section}.max_new_tokens", reason, f"packing.{name}"
