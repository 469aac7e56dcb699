"""Every setting of MegaRL, one class per owner, a sentence under each field.

Configurations are read once, never written to, and never used to pass messages between stages.
Unknown keys are errors (see :mod:`megarl.config.load` for what the user then reads).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.algorithm import GrpoAlgorithmConfig as GrpoAlgorithmConfig
from megarl.config.checkpoint import CheckpointConfig as CheckpointConfig
from megarl.config.data import BenchmarkSource as BenchmarkSource
from megarl.config.data import EvalDataConfig as EvalDataConfig
from megarl.config.data import JsonlSource as JsonlSource
from megarl.config.data import PromptDataConfig as PromptDataConfig
from megarl.config.data import PromptFormat as PromptFormat
from megarl.config.data import PromptSource as PromptSource
from megarl.config.data import ReasoningGymSource as ReasoningGymSource
from megarl.config.data import SftDataConfig as SftDataConfig
from megarl.config.data import SftJsonlSource as SftJsonlSource
from megarl.config.data import SftReasoningGymSource as SftReasoningGymSource
from megarl.config.environments import EnvironmentRuntime
from megarl.config.environments import EnvironmentSource as EnvironmentSource
from megarl.config.evaluation import EvaluationConfig as EvaluationConfig
from megarl.config.evaluation import EvaluationSizeConfig as EvaluationSizeConfig
from megarl.config.lora import LoraConfig as LoraConfig
from megarl.config.parallel import ParallelConfig as ParallelConfig
from megarl.config.router import RouterConfig
from megarl.config.run import Launcher, ProfileConfig
from megarl.config.run import RunConfig as RunConfig
from megarl.config.section import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Text,
)
from megarl.config.section import Section as Section


class ModelConfig(Section):
    """The model to train."""

    path: Text
    """Hugging Face directory: config.json, safetensors, tokenizer (eval: or a Megatron checkpoint)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type. fp32 is the fast one on CPUs without AMX/AVX512-BF16."""


class OptimizerConfig(Section):
    """Megatron's AdamW, its schedule and gradient clipping."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Where linear and cosine schedules end."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, over the run's optimizer steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (norms and biases excluded)."""
    adam_beta1: Decay = 0.9
    """First-moment decay."""
    adam_beta2: Decay = 0.95
    """Second-moment decay."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm to clip to; 0 switches clipping off."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""


class PackingConfig(Section):
    """How sequences become microbatches."""

    max_tokens_per_microbatch: PositiveInt = 4096
    """Token budget of one microbatch; no single sequence may exceed it."""
    max_sequence_length: PositiveInt | None = None
    """Longest prompt + response; null is what the model's positions and the token budget both allow."""
    share_prefix: Literal["auto", "off"] = "auto"
    """auto: compute a group's prompt once where that saves a tenth of its tokens (grpo); the same result."""


class WandbConfig(Section):
    """Weights & Biases sink."""

    project: Text
    """W&B project."""
    entity: str | None = None
    """W&B entity; null is the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline writes files under the run directory for `wandb sync`."""


class LoggingConfig(Section):
    """Sinks beside metrics.jsonl, samples/ and report.html, which are always written."""

    tensorboard: bool = False
    """Write TensorBoard events to <run.dir>/tensorboard."""
    wandb: WandbConfig | None = None
    """Send metrics to Weights & Biases."""
    samples_per_step: NonNegativeInt = 16
    """Samples written to samples/step_N.jsonl per step (0: none)."""
    report_interval: PositiveInt = 10
    """Rewrite report.html every so many steps (and at the end)."""


class EngineConfig(Section):
    """The colocated vLLM engine, or engines."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is the trainer's type, the one with which weights can be aliased."""
    kv_cache_gib: PositiveFloat = 0.5
    """Memory for the KV cache, on each rank of each engine."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded side by side, by each engine."""
    max_num_batched_tokens: PositiveInt = 4096
    """Tokens per engine step (prefill and decode together), raised to hold one whole sequence."""
    enable_prefix_caching: bool = True
    """Compute the prompt of a group once."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices; independent of the trainer's."""
    data_parallel_size: PositiveInt = 1
    """Whole engines side by side, that share the requests; with several hosts as many on each of them."""
    expert_parallel: bool = False
    """Each of these ranks holds whole experts, not a part of all of them (vLLM's enable_expert_parallel)."""
    num_threads: PositiveInt | None = None
    """CPU threads of an engine, over all its ranks; null: the cores of its host, divided by its engines."""
    start_timeout_seconds: PositiveFloat = 300.0
    """How long the engine may take to start before the run ends with an error."""


class GenerationConfig(Section):
    """How responses are generated, whatever for."""

    max_new_tokens: PositiveInt
    """Longest response; longer ones end with finish_reason length."""
    engine: EngineConfig = EngineConfig()
    """The colocated vLLM engine."""
    environments: EnvironmentRuntime = EnvironmentRuntime()
    """Where and how episodes are judged."""


class RolloutConfig(GenerationConfig):
    """What is sampled each step."""

    num_prompts_per_step: PositiveInt
    """Prompts per step."""
    num_generations_per_prompt: PositiveInt
    """Samples per prompt (the group size G)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's logprobs use the same."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest likeliest tokens with this mass; trainer logprobs use that support (1: all)."""
    top_k: NonNegativeInt = 0
    """Sample from so many of the likeliest tokens; the trainer's logprobs use the same support (0: all)."""
    router_replay: bool = False
    """Train with the experts that the engine chose for each token; for models that have experts."""
    max_staleness: Annotated[int, Field(ge=0, le=8)] = 0
    """Generate while training: samples may be so many policy versions old when learned from (0: none)."""


class DebugConfig(Section):
    """Checks that cost time, for finding out what went wrong."""

    check_numerics: bool = False
    """Stop at the first NaN or infinity in logits, logprobs or the loss's inputs, naming its token."""


class TrainingRoot(Section):
    """What every training run is made of."""

    run: RunConfig
    launcher: Launcher = "auto"
    """How trainer ranks start: auto is this machine, or torchrun or srun where they called; ray a cluster."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """Train adapters of low rank; null trains all weights."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    packing: PackingConfig = PackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    debug: DebugConfig = DebugConfig()
    profile: ProfileConfig = ProfileConfig()
    router: RouterConfig = RouterConfig()


class SftTrainingConfig(Section):
    """Length and batch of an SFT run."""

    num_steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Sequences per step, over all ranks."""
    validation_interval: NonNegativeInt = 0
    """Validation loss every so many steps (0: only at the end); needs data.held_out."""
    validation_size: PositiveInt = 128
    """Sequences per validation."""


class SftConfig(TrainingRoot):
    """Root of `megarl sft`."""

    data: SftDataConfig
    training: SftTrainingConfig


class WeightsConfig(Section):
    """How the engine gets the trainer's weights."""

    verify: Literal["off", "checksum"] = "off"
    """checksum: after every hand-over, compare checksums of every region on both sides."""
    transport: Literal["auto", "shared_memory", "peer"] = "auto"
    """auto maps memory of the engine's host and asks other hosts; peer asks all, as if on other hosts."""
    offload: list[Literal["gradients", "optimizer", "kv_cache"]] = Field(default_factory=list)
    """What gives up its memory while unused: gradients, optimizer (GPU only) and the engine's kv_cache."""
    keep_kv_cache: bool = False
    """Keep cached keys and values over a hand-over, though older weights made them."""


class OnlineTrainingConfig(Section):
    """Length of a run that learns from its own samples."""

    num_steps: PositiveInt
    """Rollout batches."""


class OnlineConfig(TrainingRoot):
    """What runs that learn from their own samples have in common."""

    data: PromptDataConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: WeightsConfig = WeightsConfig()
    training: OnlineTrainingConfig

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response, of training or of an evaluation."""
        return max(self.rollout.max_new_tokens, self.evaluation.max_new_tokens or 0)


class GrpoConfig(OnlineConfig):
    """Root of `megarl grpo`."""

    algorithm: GrpoAlgorithmConfig = GrpoAlgorithmConfig()


class EvalConfig(Section):
    """Root of `megarl eval`: accuracy, pass@k and cons@k of a checkpoint."""

    run: RunConfig
    model: ModelConfig
    data: EvalDataConfig
    rollout: GenerationConfig
    evaluation: EvaluationSizeConfig = EvaluationSizeConfig()

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens
