"""Random Hugging Face checkpoints and sequences, made without transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
TINY_MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
# The width and vocabulary of Qwen3-0.6B, with enough layers for a measurable step.
SMALL = TINY | {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}


def write(config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write config.json and random weights to ``folder``; return its path."""
    from safetensors.torch import save_file

    from megarl.models import load_architecture

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in load_architecture(folder).hf_shapes().items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if "norm" in name else 0.04 * noise).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def sequences(
    seed: int, count: int, shortest: int, longest: int, vocab: int, prompts: int = 0
) -> tuple[Any, np.ndarray]:
    """Return random sequences [S] and advantages [S]; 8 neighbours share a prompt of ``prompts`` tokens."""
    from megarl.records import TokenSequence, TrainBatch

    draw = random.Random(seed)
    made, advantages, prompt = [], [], [0]
    for number in range(count):
        length = draw.randint(shortest, longest)
        if number % 8 == 0:
            prompt = [draw.randrange(vocab) for _ in range(max(1, prompts))]
        response = [draw.randrange(vocab) for _ in range(length)]
        advantages.append(draw.gauss(0, 1))
        made.append(
            TokenSequence(
                token_ids=np.array(prompt + response),
                loss_mask=np.arange(len(prompt) + length) >= len(prompt),
                rollout_logprobs=np.array([0.0] * len(prompt) + [draw.uniform(-8, -4) for _ in response]),
                num_prompt_tokens=len(prompt) if prompts else 0,
            )
        )
    return TrainBatch.of(made), np.array(advantages)
