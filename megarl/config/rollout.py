"""How responses are generated: the engine, what is drawn, and what must hold wherever answers are judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megarl.config.data import DataReading, parts_of
from megarl.config.environments import EnvironmentRuntime, Judging
from megarl.config.evaluation import EvaluationSizeConfig
from megarl.config.model import ModelConfig
from megarl.config.section import (
    HERE,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problems,
    ProcessCount,
    Seconds,
    Section,
    at_most,
    rule,
)


class EngineConfig(Section):
    """The colocated engine, or engines."""

    backend: Literal["vllm", "hf"] = "vllm"
    """vllm; or hf, the models of transformers: for those that vLLM lacks, and to compare vLLM with."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is the trainer's type, the one with which weights can be aliased."""
    kv_cache_gib: Annotated[float, Field(gt=0), at_most(1_000_000)] = 0.5
    """Memory for the KV cache, on each rank of each engine."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded side by side, by each engine."""
    max_num_batched_tokens: PositiveInt = 4096
    """Tokens per engine step (prefill and decode together), raised to hold one whole sequence."""
    enable_prefix_caching: bool = True
    """Compute the prompt of a group once."""
    tensor_parallel_size: Annotated[int, Field(ge=1), at_most(4096)] = 1
    """Ranks that share each layer's matrices; independent of the trainer's."""
    data_parallel_size: ProcessCount = 1
    """Whole engines side by side, that share the requests; with several hosts as many on each of them."""
    expert_parallel: bool = False
    """Each of these ranks holds whole experts, not a part of all of them (vLLM's enable_expert_parallel)."""
    num_threads: ProcessCount | None = None
    """CPU threads of an engine, over all its ranks; null: its host's cores, shared with what runs beside."""
    batch_invariant: bool = False
    """On a GPU, draw the same tokens whatever is decoded beside them, with slower kernels (compute capability
    9.0 or later). On a CPU it changes nothing."""
    start_timeout_seconds: Seconds = 300.0
    """How long an engine that starts may show no progress before the run ends with an error."""

    def describe(self) -> list[str]:
        """Lines for --dry-run, where there are several."""
        count = self.data_parallel_size
        each = f"tensor_parallel_size: {self.tensor_parallel_size} each"
        return [f"engines: {count}, {each}"] if count > 1 else []

    @rule
    def _a_token_per_sequence(self) -> Problems:
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        if tokens < sequences:
            least = f"rollout.engine.max_num_seqs = {sequences}, a token per sequence"
            yield "max_num_batched_tokens", f"must be at least {least} (got {tokens})", "max_num_seqs"

    @rule
    def _what_the_backend_has(self) -> Problems:
        if self.backend != "vllm":
            names = "tensor_parallel_size expert_parallel batch_invariant"
            yield from self.unused(names, f"needs {HERE}backend = vllm", "backend")

    @rule
    def _ranks_of_experts(self) -> Problems:
        if self.expert_parallel and self.tensor_parallel_size == 1:
            needs = "rollout.engine.tensor_parallel_size > 1, whose ranks then share the experts"
            yield "expert_parallel", f"needs {needs} (got true)", "tensor_parallel_size"


class GenerationConfig(Section):
    """How responses are generated, whatever for."""

    max_new_tokens: PositiveInt
    """Longest response; longer ones end with finish_reason length."""
    engine: EngineConfig = EngineConfig()
    """The colocated engine."""
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

    @rule
    def _experts_are_recorded(self) -> Problems:
        if self.router_replay and self.engine.backend != "vllm":
            yield "router_replay", "needs rollout.engine.backend = vllm (got true)", "engine.backend"

    @property
    def num_samples(self) -> int:
        """Samples of a step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt


class Sampling:
    """Base of the roots that have answers judged: of `megarl eval` and of online training."""

    if TYPE_CHECKING:
        model: ModelConfig
        data: DataReading
        rollout: GenerationConfig
        evaluation: EvaluationSizeConfig

    def max_sequence_length(self, model_config: dict[str, Any]) -> int:
        """Longest prompt + response in tokens."""
        raise NotImplementedError

    def sequence_gib(self, model_config: dict[str, Any]) -> float:
        """The engine's cache of the longest sequence; KeyError for a size that config.json lacks."""
        heads, engine_type = model_config["num_attention_heads"], self.rollout.engine.dtype
        head_size = model_config.get("head_dim") or model_config["hidden_size"] // heads
        numbers = 2 * model_config["num_hidden_layers"] * (model_config.get("num_key_value_heads") or heads)
        dtype = self.model.dtype if engine_type == "auto" else engine_type
        size = {"float32": 4, "bfloat16": 2}[dtype] * self.max_sequence_length(model_config)
        return float(numbers * head_size * size / 2**30)

    @property
    def evaluates(self) -> bool:
        """Whether there is ever an evaluation."""
        return True

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens

    @rule
    def _held_out_size(self) -> Problems:
        size, wanted = getattr(self.data.held_out, "size", None), self.evaluation.num_prompts
        if self.evaluates and size is not None and wanted is not None and wanted > size:
            reason = f"more than the held-out set has, data.held_out.size = {size} (got {wanted})"
            yield "evaluation.num_prompts", reason, "data.held_out.size"

    def _environments(self) -> list[tuple[str, Judging]]:
        parts = [*parts_of(self.data.train, "data.train"), *parts_of(self.data.held_out, "data.held_out")]
        found = [(f"{at}.environment", getattr(part, "environment", None)) for at, part in parts]
        return [(at, environment) for at, environment in found if isinstance(environment, Judging)]

    @rule
    def _judged_in_time(self) -> Problems:
        limit = self.rollout.environments.timeout_seconds
        for at, environment in self._environments():
            for name, why, *others in environment.within(limit):
                related = "rollout.environments.timeout_seconds", *(f"{at}.{other}" for other in others)
                yield f"{at}.{name}", why, *related

    @rule
    def _tools(self) -> Problems:
        where, missing = "data.format.chat_template", not self.data.format.chat_template
        for at in (at for at, each in self._environments() if each.needs_chat_template and missing):
            yield f"{at}.kind", f"tools need {where}: true", where
