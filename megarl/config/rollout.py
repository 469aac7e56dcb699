"""Settings of rollouts: engines and sampling; rules of all roots that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megarl.config.data import DataReading, parts_of
from megarl.config.dtypes import IS_DTYPE
from megarl.config.environments import EnvironmentRuntime, Judging
from megarl.config.evaluation import LEAST_TEMPERATURE, EvaluationSizeConfig
from megarl.config.model import ModelConfig
from megarl.config.section import (
    HERE,
    NonNegativeInt,
    PositiveInt,
    Problems,
    ProcessCount,
    Seconds,
    Section,
    at_most,
    rule,
)


class EngineConfig(Section):
    """The colocated vLLM engines."""

    backend: Literal["vllm", "hf"] = "vllm"
    """vllm; or hf, the models of transformers: for those that vLLM lacks, and to compare vLLM with."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], IS_DTYPE] = "auto"
    """Dtype of the weights; auto: the trainer's, which aliasing needs."""
    kv_cache_gib: Annotated[float, Field(gt=0), at_most(1_000_000)] = 0.5
    """KV cache per engine rank."""
    max_num_seqs: PositiveInt = 256
    """Maximum concurrent sequences per engine."""
    max_num_batched_tokens: PositiveInt = 4096
    """Tokens per engine step (prefill and decode); raised to hold the longest sequence."""
    enable_prefix_caching: bool = True
    """Cache prompt prefixes, so that a group's prompt is computed once."""
    tensor_parallel_size: Annotated[int, Field(ge=1), at_most(4096)] = 1
    """Ranks per engine that shard each layer's matrices; independent of the trainer's."""
    data_parallel_size: ProcessCount = 1
    """Number of engine replicas, which share the requests; 1, or a multiple of the number of hosts."""
    expert_parallel: bool = False
    """Each rank holds whole experts, not shards of all experts (vLLM's enable_expert_parallel)."""
    num_threads: ProcessCount | None = None
    """CPU threads per engine, over all its ranks; null: the host's cores, divided among engines and ranks."""
    batch_invariant: bool = False
    """Use vLLM's batch-invariant kernels: samples do not depend on the other sequences of the batch. Slower;
    needs compute capability 9.0. No effect on a CPU."""
    start_timeout_seconds: Seconds = 300.0
    """Time without progress after which a starting engine is an error."""

    def describe(self) -> list[str]:
        """Return the lines of --dry-run=full on the engines; [] for one engine."""
        count = self.data_parallel_size
        each = f"tensor_parallel_size: {self.tensor_parallel_size} each"
        return [f"engines: {count}, {each}"] if count > 1 else []

    @rule
    def _a_token_per_sequence(self) -> Problems:
        """`max_num_batched_tokens` is at least `max_num_seqs`."""
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        if tokens < sequences:
            least = f"rollout.engine.max_num_seqs = {sequences}, one token per sequence"
            yield "max_num_batched_tokens", f"must be at least {least} (got {tokens})", "max_num_seqs"

    @rule
    def _what_the_backend_has(self) -> Problems:
        """`tensor_parallel_size`, `expert_parallel` and `batch_invariant` need `backend: vllm`."""
        if self.backend != "vllm":
            names = "tensor_parallel_size expert_parallel batch_invariant"
            yield from self.unused(names, f"needs {HERE}backend = vllm", "backend")

    @rule
    def _ranks_of_experts(self) -> Problems:
        """`expert_parallel` needs `tensor_parallel_size` > 1."""
        if self.expert_parallel and self.tensor_parallel_size == 1:
            needs = "rollout.engine.tensor_parallel_size > 1, the ranks that split the experts"
            yield "expert_parallel", f"needs {needs} (got true)", "tensor_parallel_size"


class GenerationConfig(Section):
    """Generation, for training and evaluation."""

    max_new_tokens: PositiveInt
    """Maximum tokens of a response; a response cut there has finish_reason length."""
    engine: EngineConfig = EngineConfig()
    """The colocated vLLM engines."""
    environments: EnvironmentRuntime = EnvironmentRuntime()
    """Worker processes of the environments."""


class RolloutConfig(GenerationConfig):
    """Sampling of a training step."""

    num_prompts_per_step: PositiveInt
    """Prompts per step."""
    num_generations_per_prompt: PositiveInt
    """Samples per prompt (the group size G)."""
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE)] = 1.0
    """Sampling temperature; the trainer's logprobs are scaled by it too."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this mass; also for trainer logprobs (1: off)."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens; the trainer's logprobs use the same support (0: off)."""
    router_replay: bool = False
    """Replay the engine's expert choices in the trainer; for mixtures of experts."""
    max_staleness: Annotated[int, Field(ge=0, le=8)] = 0
    """Asynchronous rollouts: maximum age of a sample in policy versions when trained on (0: synchronous)."""

    @rule
    def _experts_are_recorded(self) -> Problems:
        """`router_replay` needs `engine.backend: vllm`."""
        if self.router_replay and self.engine.backend != "vllm":
            yield "router_replay", "needs rollout.engine.backend = vllm (got true)", "engine.backend"

    @property
    def num_samples(self) -> int:
        """Samples per step."""
        return self.num_prompts_per_step * self.num_generations_per_prompt


class Sampling:
    """Base of the roots that generate and score responses: online runs and `megarl eval`."""

    if TYPE_CHECKING:
        model: ModelConfig
        data: DataReading
        rollout: GenerationConfig
        evaluation: EvaluationSizeConfig

    def max_sequence_length(self, model_config: dict[str, Any]) -> int:
        """Return the longest prompt + response in tokens."""
        raise NotImplementedError

    def sequence_gib(self, model_config: dict[str, Any]) -> float:
        """Return the KV cache in GiB of the longest sequence; KeyError if config.json lacks a size."""
        heads, engine_type = model_config["num_attention_heads"], self.rollout.engine.dtype
        head_size = model_config.get("head_dim") or model_config["hidden_size"] // heads
        numbers = 2 * model_config["num_hidden_layers"] * (model_config.get("num_key_value_heads") or heads)
        dtype = self.model.dtype if engine_type == "auto" else engine_type
        size = {"float32": 4, "bfloat16": 2}[dtype] * self.max_sequence_length(model_config)
        return float(numbers * head_size * size / 2**30)

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates."""
        return True

    @property
    def longest_response(self) -> int:
        """Maximum tokens of a response."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens

    @rule
    def _held_out_size(self) -> Problems:
        """`evaluation.num_prompts` must not exceed `data.held_out.size`."""
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
        """Time limits of an environment are below `rollout.environments.timeout_seconds`."""
        limit = self.rollout.environments.timeout_seconds
        for at, environment in self._environments():
            for name, why, *others in environment.within(limit):
                related = "rollout.environments.timeout_seconds", *(f"{at}.{other}" for other in others)
                yield f"{at}.{name}", why, *related

    @rule
    def _tools(self) -> Problems:
        """`environment: {kind: tools}` needs `data.format.chat_template: true`."""
        where, missing = "data.format.chat_template", not self.data.format.chat_template
        for at in (at for at, each in self._environments() if each.needs_chat_template and missing):
            yield f"{at}.kind", f"tools need {where}: true", where
