"""Small models with random weights, of many families, and the engine's core without a process around it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf

from megarl.inference.hf.model import build_model, measure, parameters
from megarl.inference.hf.runner import PagedRunner, RowRunner
from megarl.inference.hf.scheduler import Scheduler
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.records import token_ids
from tests.inference.mini_trainer import logprobs_of

MAX_MODEL_LEN = 256
PLAIN = SamplingConfig(temperature=1.0, stop_token_ids=(), logprobs=True)
_SIZES = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # spreads the logits, so that a wrong token shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "qwen3": (hf.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "sliding_window": 16}),  # soft caps
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 16}),
    "gpt_oss": (hf.GptOssConfig, {"head_dim": 16, "num_local_experts": 4, "sliding_window": 16}),  # sinks
    "qwen3_moe": (hf.Qwen3MoeConfig, _EXPERTS),
    "phi3": (hf.Phi3Config, {}),
    "olmo2": (hf.Olmo2Config, {}),
    "cohere": (hf.CohereConfig, {}),
    "gpt2": (hf.GPT2Config, {}),  # learned positions
    "deepseek_v3": (
        hf.DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "mamba": (hf.MambaConfig, {}),
    "bloom": (hf.BloomConfig, {}),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
}


def make_model(family: str, **sizes: Any) -> Any:
    """A model as transformers computes it, eagerly; equal weights at every call."""
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    config = kind(**{**_SIZES, **options, **sizes})
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms start at one value, where a missing or swapped one would not show
        for name, param in model.named_parameters():
            if "norm" in name or "ln_" in name:
                param.add_(torch.rand(param.shape) - 0.5)
    return model


class Core:
    """A scheduler and its model beside the reference model, whose weights it copies."""

    def __init__(
        self,
        family: str = "llama",
        *,
        paged: bool = True,
        pages: int = 200,
        sizes: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.reference = make_model(family, **(sizes or {}))
        with tempfile.TemporaryDirectory() as directory:
            self.reference.config.save_pretrained(directory)
            how = {} if paged else {"attention": "eager"}
            self.model = build_model(directory, torch.float32, torch.device("cpu"), **how)
        self.copy_weights()
        self.runner: Any = RowRunner(self.model, 2**30)
        if paged:
            self.runner = PagedRunner(
                self.model, measure(self.model), pages, keep_prefixes=options.get("share_prompts", True)
            )
        settings = {"max_num_seqs": 8, "max_tokens": 512, "share_prompts": True, **options}
        self.scheduler = Scheduler(self.runner, max_model_len=MAX_MODEL_LEN, seed=1, **settings)

    def copy_weights(self) -> None:
        theirs = parameters(self.reference)
        with torch.no_grad():
            for name, param in parameters(self.model).items():
                param.copy_(theirs[name])

    def run(
        self, requests: Sequence[GenerateRequest], sampling: SamplingConfig = PLAIN
    ) -> dict[str, GeneratedResponse]:
        self.scheduler.add(requests, sampling)
        return self.finish()

    def finish(self) -> dict[str, GeneratedResponse]:
        found = {}
        while len(self.scheduler):
            for response in self.scheduler.step():
                found[response.request_id] = response
        return found

    def logprob_error(
        self, requests: Sequence[GenerateRequest], responses: dict[str, GeneratedResponse]
    ) -> float:
        """Largest difference from the reference's forward pass over each whole sequence."""
        assert sorted(responses) == sorted(request.request_id for request in requests)
        errors = []
        for request in requests:
            response = responses[request.request_id]
            expected = logprobs_of(self.reference, request.prompt_ids, response.token_ids)
            errors.append((expected - torch.from_numpy(response.logprobs)).abs().max().item())
        return max(errors)


def make_requests(count: int, *, prompts: int | None = None, length: int = 40) -> list[GenerateRequest]:
    """Of uneven lengths, prompts around PAGE; with ``prompts`` every so many in a row have the same one."""
    generator = np.random.default_rng(3)
    made = [token_ids(generator.integers(0, 250, 5 + (i * 17) % length)) for i in range(prompts or count)]
    return [
        GenerateRequest(f"r{i}", made[i * len(made) // count], 4 + (i * 29) % 60, seed=100 + i)
        for i in range(count)
    ]
