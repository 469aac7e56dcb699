"""Settings and rules shared by all training runs."""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, PlainSerializer

from megarl.config.checkpoint import CheckpointConfig
from megarl.config.logging import LoggingConfig
from megarl.config.lora import LoraConfig
from megarl.config.metric_names import STEP, is_metric
from megarl.config.model import ModelConfig
from megarl.config.optimizer import OptimizerConfig
from megarl.config.packing import PackingConfig
from megarl.config.parallel import ParallelConfig
from megarl.config.router import RouterConfig
from megarl.config.run import Launcher, ProfileConfig, RunConfig
from megarl.config.section import PositiveFloat, Problems, Section, find_violations, rule
from megarl.config.trainer import TrainerConfig
from megarl.config.violation import dotted, show
from megarl.errors import UserError

_BACKEND = "trainer.backend"
OF_MEGATRON = (
    "parallel.pipeline_parallel_size",
    "parallel.context_parallel_size",
    "parallel.context_attention",
    "parallel.context_split_from",
    "parallel.virtual_pipeline_parallel_size",
    "parallel.expert_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.expert_dispatcher",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "router.aux_loss_coef",
    "router.bias_update_rate",
)
"""Features that trainer.backend torch lacks."""
ALWAYS_IN_TORCH = ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather")
"""Features that trainer.backend torch always applies."""


class DebugConfig(Section):
    """Expensive checks for debugging."""

    check_numerics: bool = False
    """Stop at the first NaN or infinity in logits, logprobs or the inputs of the loss, and name its token."""


class TrainingRoot(Section):
    """Base of the roots of training runs."""

    run: RunConfig
    launcher: Launcher = "auto"
    """auto: local processes, or the ranks started by torchrun or srun; ray: ranks on a Ray cluster."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """Train LoRA adapters; null: train all weights."""
    trainer: TrainerConfig = TrainerConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    packing: PackingConfig = PackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    debug: DebugConfig = DebugConfig()
    profile: ProfileConfig = ProfileConfig()
    router: RouterConfig = RouterConfig()

    converts_checkpoints: ClassVar[bool] = True
    """Whether model.path may be a checkpoint."""
    sequences_per_example: ClassVar[int] = 1
    """Sequences per example, which share a microbatch."""
    example: ClassVar[str] = "sequences"
    """Unit of the batch size, in messages."""
    metric_names: ClassVar[frozenset[str]] = STEP
    """Names of metrics.jsonl."""
    if TYPE_CHECKING:  # each root has its own types
        data: Any
        training: Any

    @property
    def logs_others(self) -> bool:
        """Whether code of the user's own may log metrics of other names."""
        return False

    @property
    def offloads(self) -> list[str]:
        """Memory to free while unused."""
        return []

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the (policy's) run: the length of the learning-rate schedule."""
        return int(self.training.num_steps or 0)

    def max_sequence_length(self, model_config: dict[str, Any]) -> int:
        """Return the longest prompt + response in tokens.

        packing.max_sequence_length if set; else the smaller of max_position_embeddings and the token budget
        of a microbatch divided by sequences_per_example.
        """
        budget = self.packing.max_tokens_per_microbatch // self.sequences_per_example
        return self.packing.max_sequence_length or min(int(model_config["max_position_embeddings"]), budget)

    def measures(self, metric: str) -> bool:
        """Return whether a metric is computed on data.held_out."""
        return metric.startswith("validation_")

    def describe(self, model_config: dict[str, Any] | None) -> list[str]:
        """Return the lines of --dry-run=full on derived values, by the properties that the loops read."""
        parallel = self.parallel
        lines = [
            f"trainer processes: {parallel.num_processes}, data_parallel_size: {parallel.data_parallel_size}"
        ]
        if model_config is not None and "max_position_embeddings" in model_config:
            lines.append(f"longest sequence: {self.max_sequence_length(model_config)} tokens")
        lines += [*self.describe_batch(), f"optimizer steps in all: {self._steps_in_words()}"]
        lines += [f"note: {line}" for line in self.notes()]
        if (lora := self.lora) is not None:
            targets = ", ".join(lora.target_modules)
            lines.append(f"trained: adapters of rank {lora.rank} on {targets}; exported: {lora.export}")
        return lines

    def _steps_in_words(self) -> str:
        epochs = getattr(self.training, "num_epochs", None)
        steps = self.num_optimizer_steps
        return f"{steps or 'by the number of rows'}" + (f" ({epochs:g} epochs)" if epochs else "")

    def describe_batch(self) -> list[str]:
        """Return the lines on the batch."""
        return []

    def notes(self) -> list[str]:
        """Return a line per valid setting that may not do what was meant, for the start of a run."""
        return self.optimizer.notes("optimizer", self.num_optimizer_steps)

    def with_steps(self, num_rows: int) -> Self:
        """Return the configuration with the number of steps that its training rows give, if they do."""
        return self

    def empty_ranks(self, field: str, step: str, size: int) -> Problems:
        """Rule: ``size`` examples per step, set by ``field``, give every data-parallel rank at least one."""
        if size < (ranks := self.parallel.data_parallel_size):
            reason = f"{step} of {size} {self.example} leaves some of {ranks} data-parallel ranks empty"
            yield field, reason, "parallel.num_processes"

    @rule
    def _of_megatron_alone(self) -> Problems:
        """`trainer.backend: torch` has no pipeline, context and expert parallelism and no router losses, and
        always overlaps communication."""
        if self.trainer.backend != "torch":
            return
        for name, value in self.changed(*OF_MEGATRON):
            got = value if isinstance(value, str) else show(value)
            yield name, f"the torch backend has none; trainer.backend = megatron has it (got {got})", _BACKEND
        for name, _ in self.changed(*ALWAYS_IN_TORCH):
            yield name, "the torch backend does so always: leave it at its default", _BACKEND

    @rule
    def _of_torch_alone(self) -> Problems:
        """`model.trust_remote_code` needs `trainer.backend: torch`."""
        if self.trainer.backend != "torch":
            why = "needs trainer.backend = torch: models with a table run no code of their own"
            yield from self.unused("model.trust_remote_code", why, _BACKEND)

    @rule
    def _replicas(self) -> Problems:
        """`trainer.replicate_size` divides the data-parallel size."""
        ranks, replicas = self.parallel.data_parallel_size, self.trainer.replicate_size
        if ranks % replicas:
            reason = f"must divide the {ranks} data-parallel ranks (got {replicas})"
            yield "trainer.replicate_size", reason, "parallel.num_processes"

    @rule
    def _ring_shares_no_prefixes(self) -> Problems:
        """`parallel.context_attention: ring` needs `packing.share_prefix: off`."""
        if self.parallel.context_attention == "ring" and self.packing.share_prefix != "off":
            reason = "ring has no shared prefixes: set packing.share_prefix: off, or use all_gather"
            yield "parallel.context_attention", reason, "packing.share_prefix"

    @rule
    def _whole_sequences_fit_one_rank(self) -> Problems:
        """`parallel.context_split_from` - 1 tokens fit into one rank's share of
        `packing.max_tokens_per_microbatch`."""
        parallel, split_from = self.parallel, self.parallel.context_split_from
        if split_from is None or (ranks := parallel.context_parallel_size) == 1:
            return
        multiple = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
        most = self.packing.max_tokens_per_microbatch // ranks // multiple * multiple
        if split_from - 1 > most:
            budget, size = "packing.max_tokens_per_microbatch", "context_parallel_size"
            share = f"shorter sequences must fit into one rank's share of a microbatch, {budget} / {size}"
            reason = f"{share}: at most {most + 1} (got {split_from})"
            yield "parallel.context_split_from", reason, budget, f"parallel.{size}"

    @rule
    def _param_gather(self) -> Problems:
        """`parallel.overlap_param_gather` needs `optimizer.distributed`."""
        if self.parallel.overlap_param_gather and not self.optimizer.distributed:
            reason = "needs optimizer.distributed = true"
            yield "parallel.overlap_param_gather", reason, "optimizer.distributed"

    @rule
    def _best_checkpoint(self) -> Problems:
        """`checkpoint.keep_best_metric` is a metric of this kind of run; on held-out data it needs
        `data.held_out`."""
        metric = self.checkpoint.keep_best_metric
        if metric is None:
            return
        if not (is_metric(metric, self.metric_names) or self.logs_others):
            near = get_close_matches(metric, self.metric_names, n=3, cutoff=0.7)
            hint = f"did you mean {', '.join(near)}?" if near else "docs/metrics.md lists them"
            yield "checkpoint.keep_best_metric", f"no metric of this kind of run; {hint} (got {metric!r})"
        elif self.measures(metric) and self.data.held_out is None:
            reason = f"{metric} is computed on data.held_out, which is not set: set it, or this one to null"
            yield "checkpoint.keep_best_metric", reason, "data.held_out"

    @rule
    def _traced_steps(self) -> Problems:
        """`profile.steps` must not exceed `training.num_steps`."""
        last = self.training.num_steps
        if last is not None and (late := sorted(step for step in self.profile.traced if step > last)):
            got = ", ".join(map(str, late[:5]))
            yield "profile.steps", f"the run ends with step {last} (got {got})", "training.num_steps"

    @rule
    def _tracing_ranks(self) -> Problems:
        """`profile.ranks` are below `parallel.num_processes`."""
        ranks = self.parallel.num_processes
        got = ", ".join(str(rank) for rank in self.profile.ranks if rank >= ranks)
        if self.profile.traced and got:
            yield "profile.ranks", f"must be from 0 to {ranks - 1} (got {got})", "parallel.num_processes"

    @rule
    def _frozen_router(self) -> Problems:
        """`router.bias_update_rate` cannot be combined with `lora`."""
        if self.lora is not None and (rate := self.router.bias_update_rate):
            reason = f"not with lora, which freezes the model's weights (got {rate})"
            yield "router.bias_update_rate", reason, "lora"


class DerivedSteps(int):
    """A number of steps that follows from training.num_epochs; what is written of it is null."""


_Steps = Annotated[
    int, Field(ge=1), PlainSerializer(lambda steps: None if isinstance(steps, DerivedSteps) else steps)
]


class OfflineTraining(Section):
    """Length of a run on a dataset; subclasses add the size of its batches."""

    num_steps: _Steps | None = None
    """Optimizer steps; this or num_epochs."""
    num_epochs: PositiveFloat | None = None
    """Times that every row of data.train is drawn, 0.5 for half of them; the last step is a full batch."""

    if TYPE_CHECKING:
        batch_size: int

    @rule
    def _one_length(self) -> Problems:
        """Exactly one of `num_steps` and `num_epochs` is set."""
        if self.num_steps is None and self.num_epochs is None:
            yield "num_steps", "required but missing: give it or training.num_epochs", "num_epochs"
        elif None not in (self.num_steps, self.num_epochs) and not isinstance(self.num_steps, DerivedSteps):
            reason = "excludes training.num_epochs: remove one of them"
            yield "num_steps", f"{reason} (got {self.num_steps} and {self.num_epochs:g})", "num_epochs"

    def steps_of(self, num_rows: int) -> int:
        """Return the number of steps on ``num_rows`` training rows."""
        if self.num_epochs is None:
            assert self.num_steps is not None, "a rule asks for one of them"
            return self.num_steps
        return max(1, math.ceil(round(self.num_epochs * num_rows, 6) / self.batch_size))


class OfflineRoot(TrainingRoot):
    """Base of the roots that train on a dataset (sft, dpo, rm)."""

    a_step: ClassVar[str] = "an optimizer step"

    def with_steps(self, num_rows: int) -> Self:
        """Return the configuration with the number of steps that num_epochs gives on ``num_rows`` rows.

        Raises:
            UserError: settings that do not fit this number, later profile.steps say.
        """
        training = self.training
        if training.num_epochs is None:
            return self
        steps = DerivedSteps(training.steps_of(num_rows))
        found = self.model_copy(update={"training": training.model_copy(update={"num_steps": steps})})
        if violations := find_violations(found):
            lines = [f"{dotted(each.path)}: {each.message}" for each in violations]
            raise UserError("\n".join(lines))
        return found

    def describe_batch(self) -> list[str]:
        """Return the lines of --dry-run=full on the batch."""
        return [f"{self.example} per step: {self.training.batch_size}"]

    @rule
    def _epochs(self) -> Problems:
        """`training.num_epochs` needs data of which every row is drawn once per epoch: no `weights`."""
        if self.training.num_epochs is not None and getattr(self.data.train, "weights", None) is not None:
            reason = "each source of a weighted mixture has its own epochs: use training.num_steps"
            yield "training.num_epochs", f"{reason} (got {self.training.num_epochs:g})", "data.train.weights"

    @rule
    def _epochs_of_a_stream(self) -> Problems:
        """`training.num_epochs` needs data that is not streamed, whose number of rows is known."""
        if self.training.num_epochs is not None and (streamed := self.data.streamed("train")):
            reason = f"data.{streamed[0]}.streaming leaves the number of rows unknown: use training.num_steps"
            got = f"{reason} (got {self.training.num_epochs:g})"
            yield "training.num_epochs", got, f"data.{streamed[0]}.streaming"

    @rule
    def _batch(self) -> Problems:
        """`training.batch_size` must not exceed `data.train.size`."""
        batch, size = self.training.batch_size, getattr(self.data.train, "size", None)
        if size is not None and batch > size:
            reason = f"larger than the training set, data.train.size = {size} (got {batch})"
            yield "training.batch_size", reason, "data.train.size"

    @rule
    def _ranks(self) -> Problems:
        """`training.batch_size` is at least the data-parallel size."""
        yield from self.empty_ranks("training.batch_size", self.a_step, self.training.batch_size)

    @rule
    def _validation(self) -> Problems:
        """`training.validation_interval` needs `data.held_out`; `training.validation_size` must not exceed
        `data.held_out.size`."""
        interval, held_out = self.training.validation_interval, self.data.held_out
        if interval and held_out is None:
            reason = f"needs data.held_out, which is not set: set it, or this one to 0 (got {interval})"
            yield "training.validation_interval", reason, "data.held_out"
        size, wanted = getattr(held_out, "size", None), self.training.validation_size
        if size is not None and wanted > size:
            reason = f"larger than the held-out set, data.held_out.size = {size} (got {wanted})"
            yield "training.validation_size", reason, "data.held_out.size"
