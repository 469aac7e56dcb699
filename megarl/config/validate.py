"""Combinations of settings that cannot work, each a rule of its own.

A rule looks at a configuration whose fields have valid types and yields what is wrong. Rules never
raise: all violations of a configuration are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from megarl.config.derived import OnlineRoot, TrainingConfig, model_parallel_size, num_optimizer_steps
from megarl.config.distill import DistillConfig
from megarl.config.ppo import PpoConfig
from megarl.config.preference import DpoConfig, RmConfig
from megarl.config.schema import (
    EnvironmentSource,
    EvalConfig,
    GrpoConfig,
    OnlineConfig,
    ReasoningGymSource,
    Section,
    SftConfig,
)
from megarl.config.validate_algorithm import ALGORITHM_RULES
from megarl.config.validate_data import DATA_RULES
from megarl.config.validate_distill import DISTILL_RULES
from megarl.config.validate_environments import ENVIRONMENT_RULES
from megarl.config.validate_evaluation import EVALUATION_RULES, ONLINE_EVALUATION_RULES
from megarl.config.validate_lora import LORA_RULES
from megarl.config.validate_ppo import PPO_RULES
from megarl.config.validate_preference import DPO_RULES, RM_RULES
from megarl.config.validate_run import RUN_RULES
from megarl.config.violation import Violation

Violations = Iterator[Violation]
_Config = TypeVar("_Config", bound=Section)


def find_violations(config: Section, *, partial: bool = False) -> list[Violation]:
    """Every violated rule of ``config`` (a root: SftConfig, DpoConfig, ...).

    With ``partial`` the configuration lacks the fields that failed the schema; rules that ask for one
    of them are skipped.
    """
    found: list[Violation] = []
    if isinstance(config, SftConfig):
        found += _apply(_TRAINING_RULES + _SFT_RULES, config, partial)
    elif isinstance(config, DpoConfig):
        found += _apply(_TRAINING_RULES + DPO_RULES, config, partial)
    elif isinstance(config, RmConfig):
        found += _apply(_TRAINING_RULES + RM_RULES, config, partial)
    elif isinstance(config, GrpoConfig):
        found += _apply(_TRAINING_RULES + _ONLINE_RULES + ALGORITHM_RULES, config, partial)
    elif isinstance(config, PpoConfig):
        found += _apply(_TRAINING_RULES + _ONLINE_RULES + PPO_RULES, config, partial)
    elif isinstance(config, DistillConfig):
        found += _apply(_TRAINING_RULES + _ONLINE_RULES + DISTILL_RULES, config, partial)
    elif isinstance(config, EvalConfig):
        found += _apply(_EVAL_RULES, config, partial)
    return found


def _apply(rules: list[Callable[[_Config], Violations]], config: _Config, partial: bool) -> list[Violation]:
    found: list[Violation] = []
    for rule in rules:
        try:
            found += rule(config)
        except AttributeError:
            if not partial:
                raise
    return found


def _parallel_sizes(config: TrainingConfig) -> Violations:
    parallel = config.parallel
    product = model_parallel_size(parallel)
    if parallel.num_processes % product:
        yield Violation(
            ("parallel", "num_processes"),
            "must be a multiple of tensor_parallel_size * pipeline_parallel_size * context_parallel_size"
            f" = {product} (got {parallel.num_processes})",
            (
                ("parallel", "tensor_parallel_size"),
                ("parallel", "pipeline_parallel_size"),
                ("parallel", "context_parallel_size"),
            ),
        )


def _ring(config: TrainingConfig) -> Violations:
    if config.parallel.context_attention != "ring":
        return
    field = ("parallel", "context_attention")
    if config.parallel.context_parallel_size == 1:
        yield Violation(
            field,
            "ring needs parallel.context_parallel_size > 1 (got context_parallel_size 1)",
            (("parallel", "context_parallel_size"),),
        )
    if config.packing.share_prefix != "off":
        yield Violation(
            field,
            "ring has no shared prefixes: set packing.share_prefix: off, or use all_gather",
            (("packing", "share_prefix"),),
        )


def _context_split(config: TrainingConfig) -> Violations:
    parallel, split_from = config.parallel, config.parallel.context_split_from
    if split_from is None:
        return
    field, ranks = ("parallel", "context_split_from"), parallel.context_parallel_size
    if ranks == 1:
        yield Violation(
            field,
            "needs parallel.context_parallel_size > 1 (got context_parallel_size 1)",
            (("parallel", "context_parallel_size"),),
        )
        return
    multiple = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    most = config.packing.max_tokens_per_microbatch // ranks // multiple * multiple
    if split_from - 1 > most:
        yield Violation(
            field,
            "a shorter sequence must fit one rank's share of a microbatch, packing.max_tokens_per_microbatch "
            f"/ context_parallel_size: at most {most + 1} (got {split_from})",
            (("packing", "max_tokens_per_microbatch"), ("parallel", "context_parallel_size")),
        )


def _sequence_parallel(config: TrainingConfig) -> Violations:
    if config.parallel.sequence_parallel and config.parallel.tensor_parallel_size == 1:
        yield Violation(
            ("parallel", "sequence_parallel"),
            "needs parallel.tensor_parallel_size > 1 (got tensor_parallel_size 1)",
            (("parallel", "tensor_parallel_size"),),
        )


def _virtual_pipeline(config: TrainingConfig) -> Violations:
    parallel = config.parallel
    if parallel.virtual_pipeline_parallel_size > 1 and parallel.pipeline_parallel_size == 1:
        yield Violation(
            ("parallel", "virtual_pipeline_parallel_size"),
            "needs parallel.pipeline_parallel_size > 1 (got pipeline_parallel_size 1)",
            (("parallel", "pipeline_parallel_size"),),
        )


def _uneven_stages(config: TrainingConfig) -> Violations:
    parallel = config.parallel
    for name in ("first_stage_layers", "last_stage_layers"):
        if getattr(parallel, name) is None:
            continue
        if parallel.pipeline_parallel_size == 1 or parallel.virtual_pipeline_parallel_size > 1:
            yield Violation(
                ("parallel", name),
                "needs parallel.pipeline_parallel_size > 1 and virtual_pipeline_parallel_size 1",
                (("parallel", "pipeline_parallel_size"), ("parallel", "virtual_pipeline_parallel_size")),
            )


def _overlap(config: TrainingConfig) -> Violations:
    parallel = config.parallel
    if not parallel.overlap_param_gather:
        return
    field = ("parallel", "overlap_param_gather")
    if not config.optimizer.distributed:
        yield Violation(field, "needs optimizer.distributed = true", (("optimizer", "distributed"),))
    if not parallel.overlap_grad_reduce:
        reason = "needs parallel.overlap_grad_reduce = true (Megatron's hooks are the same)"
        yield Violation(field, reason, (("parallel", "overlap_grad_reduce"),))
    if isinstance(config, OnlineConfig):
        yield Violation(field, "not with an engine: engines read the parameters right after every step", ())


def _expert_parallel(config: TrainingConfig) -> Violations:
    parallel = config.parallel
    stage, rest = divmod(parallel.num_processes, parallel.pipeline_parallel_size)
    size, split = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    if not rest and stage % (size * split):
        times = f"times expert_tensor_parallel_size = {split} " if split > 1 else ""
        yield Violation(
            ("parallel", "expert_parallel_size"),
            f"{times}must divide the {stage} ranks of a pipeline stage (got {size})",
            (("parallel", "num_processes"), ("parallel", "pipeline_parallel_size")),
        )


def _learning_rates(config: TrainingConfig) -> Violations:
    if config.optimizer.min_lr > config.optimizer.lr:
        yield Violation(
            ("optimizer", "min_lr"),
            f"must not exceed optimizer.lr = {config.optimizer.lr} (got {config.optimizer.min_lr})",
            (("optimizer", "lr"),),
        )


def _warmup(config: TrainingConfig) -> Violations:
    steps = num_optimizer_steps(config)
    if config.optimizer.lr_warmup_steps > steps:
        yield Violation(
            ("optimizer", "lr_warmup_steps"),
            f"longer than the run's {steps} optimizer steps (got {config.optimizer.lr_warmup_steps})",
            (("training", "num_steps"),),
        )


def _token_budget(config: TrainingConfig) -> Violations:
    packing = config.packing
    longest = packing.max_sequence_length
    if longest is not None and longest > packing.max_tokens_per_microbatch:
        yield Violation(
            ("packing", "max_sequence_length"),
            "a sequence of this length must fit into one microbatch, packing.max_tokens_per_microbatch ="
            f" {packing.max_tokens_per_microbatch} (got {longest})",
            (("packing", "max_tokens_per_microbatch"),),
        )


def _sft_sizes(config: SftConfig) -> Violations:
    train, batch_size = config.data.train, config.training.batch_size
    if isinstance(train, ReasoningGymSource) and batch_size > train.size:
        yield Violation(
            ("training", "batch_size"),
            f"larger than the training set, data.train.size = {train.size} (got {batch_size})",
            (("data", "train", "size"),),
        )


def _sft_validation(config: SftConfig) -> Violations:
    training, held_out = config.training, config.data.held_out
    if training.validation_interval and held_out is None:
        yield Violation(
            ("training", "validation_interval"),
            f"needs data.held_out, which is not set (got {training.validation_interval})",
            (("data", "held_out"),),
        )
    if isinstance(held_out, ReasoningGymSource) and training.validation_size > held_out.size:
        yield Violation(
            ("training", "validation_size"),
            f"larger than the held-out set, data.held_out.size = {held_out.size}"
            f" (got {training.validation_size})",
            (("data", "held_out", "size"),),
        )


def _sft_ranks(config: SftConfig) -> Violations:
    yield from _enough_for_ranks(config, config.training.batch_size, ("training", "batch_size"))


def _rollout_ranks(config: OnlineRoot) -> Violations:
    rollout, updates = config.rollout, config.algorithm.num_optimizer_steps_per_batch
    samples = rollout.num_prompts_per_step * rollout.num_generations_per_prompt
    if samples >= updates:
        yield from _enough_for_ranks(config, samples // updates, ("rollout", "num_prompts_per_step"))


def _enough_for_ranks(config: TrainingConfig, sequences: int, path: tuple[str, ...]) -> Violations:
    ranks = config.parallel.num_processes // model_parallel_size(config.parallel)
    if sequences < ranks:
        yield Violation(
            path,
            f"an optimizer step of {sequences} sequences leaves some of {ranks} data-parallel ranks empty",
            (("parallel", "num_processes"),),
        )


def _updates_per_batch(config: OnlineRoot) -> Violations:
    prompts, updates = config.rollout.num_prompts_per_step, config.algorithm.num_optimizer_steps_per_batch
    if prompts % updates:
        yield Violation(
            ("rollout", "num_prompts_per_step"),
            f"must be a multiple of algorithm.num_optimizer_steps_per_batch = {updates} (got {prompts})",
            (("algorithm", "num_optimizer_steps_per_batch"),),
        )


def _rollout_size(config: OnlineConfig) -> Violations:
    train, prompts = config.data.train, config.rollout.num_prompts_per_step
    sized = ReasoningGymSource | EnvironmentSource
    if isinstance(train, sized) and prompts > train.size:
        yield Violation(
            ("rollout", "num_prompts_per_step"),
            f"more than the training set has, data.train.size = {train.size} (got {prompts})",
            (("data", "train", "size"),),
        )


def _response_lengths(config: OnlineConfig) -> Violations:
    packing = config.packing
    limit, name = packing.max_sequence_length, "packing.max_sequence_length"
    if limit is None:
        limit, name = packing.max_tokens_per_microbatch, "packing.max_tokens_per_microbatch"
    lengths = {
        ("rollout", "max_new_tokens"): config.rollout.max_new_tokens,
        ("evaluation", "max_new_tokens"): config.evaluation.max_new_tokens,
    }
    for path, length in lengths.items():
        if length is not None and length >= limit:
            yield Violation(
                path,
                f"leaves no room for a prompt within {name} = {limit} (got {length})",
                (("packing", name.split(".")[1]),),
            )


def _engine(config: OnlineConfig | EvalConfig) -> Violations:
    engine = config.rollout.engine
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        yield Violation(
            ("rollout", "engine", "max_num_batched_tokens"),
            f"must be at least rollout.engine.max_num_seqs = {engine.max_num_seqs}, a token per sequence"
            f" (got {engine.max_num_batched_tokens})",
            (("rollout", "engine", "max_num_seqs"),),
        )
    if engine.expert_parallel and engine.tensor_parallel_size == 1:
        yield Violation(
            ("rollout", "engine", "expert_parallel"),
            "needs rollout.engine.tensor_parallel_size > 1, whose ranks then share the experts (got true)",
            (("rollout", "engine", "tensor_parallel_size"),),
        )


_TRAINING_RULES: list[Callable[[TrainingConfig], Violations]] = [
    *RUN_RULES,
    _parallel_sizes,
    _ring,
    _context_split,
    _sequence_parallel,
    _virtual_pipeline,
    _uneven_stages,
    _overlap,
    _expert_parallel,
    _learning_rates,
    _warmup,
    _token_budget,
    *DATA_RULES,
    *LORA_RULES,
]
_SFT_RULES: list[Callable[[SftConfig], Violations]] = [_sft_sizes, _sft_validation, _sft_ranks]
_ONLINE_RULES: list[Callable[[OnlineRoot], Violations]] = [
    _updates_per_batch,
    _rollout_size,
    _rollout_ranks,
    _response_lengths,
    *ENVIRONMENT_RULES,
    _engine,
    *ONLINE_EVALUATION_RULES,
]
_EVAL_RULES: list[Callable[[EvalConfig], Violations]] = [
    *DATA_RULES,
    *ENVIRONMENT_RULES,
    _engine,
    *EVALUATION_RULES,
]
