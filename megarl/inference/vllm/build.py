"""Build a vLLM engine with unset weights, whose kernels read its parameters directly."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from megarl import platform
from megarl.errors import UserError
from megarl.inference.actor.settings import EngineSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.llm_engine import LLMEngine

# Prefixes are shared in whole blocks; with the default of 128 tokens, short prompts would share none.
KV_BLOCK_SIZE = 32
_NO_SHARE = 1e-6  # of the GPU's memory, a few hundred KiB; vLLM rejects 0
LATENT_KV_BLOCK_SIZE = 16  # the only size of the CPU kernel; latent attention on GPUs is untested


def build_engine(settings: EngineSettings) -> LLMEngine:
    """Build an in-process vLLM engine with unset weights, whose kernels read its parameters directly.

    Raises:
        UserError: the settings do not work here; also if a worker process found out.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    model = _register_architecture(settings.model_dir)
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(settings, model, _on_gpu())))
    except RuntimeError as error:
        if (error_text := _worker_user_error(error)) is not None:
            raise UserError(error_text) from error
        raise
    # A worker process that dies takes the actor with it; the driver then restarts both.
    engine.model_executor.register_failure_callback(lambda: os._exit(1))
    _check_head_sizes(engine)
    if settings.record_routing and not returns_routing(engine):
        engine.collective_rpc("megarl_record_routing")
    return engine


def engine_arguments(settings: EngineSettings, model: PretrainedConfig, on_gpu: bool) -> dict[str, Any]:
    """Return vLLM's EngineArgs by name."""
    config = settings.config
    latent = getattr(model, "kv_lora_rank", None) is not None
    arguments: dict[str, Any] = {
        "model": settings.model_dir,
        "skip_tokenizer_init": True,
        "load_format": "dummy",  # weights come from attach
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),  # the default misjudges the free memory
        "max_num_seqs": config.max_num_seqs,
        # Prompts are prefilled whole: for a partial prefill vLLM takes back the seeded generator's last
        # draw, which a CPU generator cannot do ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, settings.max_model_len),
        "block_size": LATENT_KV_BLOCK_SIZE if latent else KV_BLOCK_SIZE,
        "enable_prefix_caching": config.enable_prefix_caching,
        "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p, like the trainer's
        "hf_overrides": _overrides(model),
        "generation_config": "vllm",  # the model's generation_config.json must not change sampling
        "async_scheduling": False,
        "disable_log_stats": True,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enable_expert_parallel": config.expert_parallel,  # over the tensor ranks
        "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else None,
        "worker_extension_cls": "megarl.inference.vllm.extension.WeightReceiver",
    }
    if on_gpu:
        arguments |= {
            "worker_cls": "megarl.inference.vllm.gpu_worker.GpuWorker",
            # vLLM requires this share of the whole GPU to be free, whatever the KV cache's size; the trainer
            # uses it already. GpuWorker compares the needed memory with the free memory.
            "gpu_memory_utilization": _NO_SHARE,
            "moe_backend": "triton",  # the one that keeps experts as stored; see layout.py
            "enable_sleep_mode": settings.offload_kv_cache,
            "enable_return_routed_experts": settings.record_routing,
        }
    return arguments


def _overrides(model: PretrainedConfig) -> dict[str, Any]:
    """Return the keys of config.json that vLLM has to read otherwise."""
    overrides: dict[str, Any] = {}
    if model.model_type == "deepseek_v3":
        # Without this field, which transformers does not write, vLLM ignores the router's bias.
        overrides["topk_method"] = "noaux_tc"
    if getattr(model, "quantization_config", None) is not None:
        overrides["quantization_config"] = None  # the trainer's weights are dequantised
    return overrides


def returns_routing(engine: LLMEngine) -> bool:
    """Return True if vLLM returns the tokens' experts; its second model runner does, on GPUs."""
    return bool(engine.vllm_config.aux_output_config.enable_return_routed_experts)


def _on_gpu() -> bool:
    return platform.chosen_name() != "cpu"


def _worker_user_error(error: RuntimeError) -> str | None:
    """Recover a worker process's UserError from its text, which is all that vLLM passes on."""
    found = re.search(
        r"Worker failed with error '(rollout\.[\w.]+: .*)', please check", str(error), re.DOTALL
    )
    return None if found is None else found[1]


def _check_head_sizes(engine: LLMEngine) -> None:
    """Raise UserError for head sizes that vLLM's CPU attention rejects, else only at the first request."""
    for layer in engine.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "head_size") and not layer.attn_backend.supports_head_size(layer.head_size):
            sizes = ", ".join(map(str, layer.attn_backend.get_supported_head_sizes()))
            raise UserError(
                f"model.path {engine.model_config.model}: vLLM's CPU attention does not take"
                f" head size {layer.head_size} (only {sizes})"
            )


def _register_architecture(model_dir: str) -> PretrainedConfig:
    """Register the model's class as an object: by name, vLLM inspects it in a child process (15 s once)."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(model_dir)
    names = config.architectures or []
    if not set(names) & set(ModelRegistry.models):
        raise UserError(
            f"model.path: vLLM has no {' or '.join(names) or 'architecture'} ({model_dir}); "
            "rollout.engine.backend = hf generates with any model of transformers"
        )
    for name in names:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    return config
