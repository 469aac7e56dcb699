"""Small random models of families that have no table here, and what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 250
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
}
# Name in transformers -> options that differ from the sizes above.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi": {"num_key_value_heads": 4},  # biases everywhere, of the head too
    "phi3": {},
    "gemma2": WINDOWED | {"head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": WINDOWED | {"head_dim": 16},
    "olmo2": {},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": WINDOWED | {"logit_scale": 0.25},
    "gpt_oss": WINDOWED | EXPERTS | {"head_dim": 16},
    "qwen3_next": LINEAR,
}


def save_family(name: str, directory: Path) -> None:
    """Write a model in fp32 whose biases and norms are no longer 0 and 1."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(directory)


def make_sequences(lengths: list[int]) -> list[Any]:
    """Random sequences whose tokens are all targets."""
    import torch

    from megarl.records import TokenSequence

    draw = torch.Generator().manual_seed(1)
    return [
        TokenSequence(torch.randint(3, VOCAB, (n,), generator=draw).numpy(), torch.ones(n).int().numpy())
        for n in lengths
    ]


def alone(model_dir: str, sequences: list[Any]) -> list[Any]:
    """Logprobs of each sequence by transformers itself, in a process where torch is as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    found = []
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.from_numpy(sequence.token_ids).long()
            logits = model(ids[None]).logits[0].float()
            found.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy())
    return found


def packed(context: Any, model_dir: str, sequences: list[Any]) -> dict[str, Any]:
    """Logprobs of sequences in one microbatch, by the trainer, and what a few SFT steps make of the loss."""
    import torch

    from megarl.losses.sft import sft_loss
    from megarl.models import load_architecture
    from megarl.records import TrainBatch
    from megarl.trainer.passes import train_step
    from tests.trainer.torch import backend_ranks

    assert load_architecture(model_dir, any_family=True).rules
    batch = TrainBatch.of(sequences)
    trainer = backend_ranks.build(
        context,
        model_dir,
        any_family=True,
        budget=batch.num_tokens,
        optimizer={"lr": 3e-3, "weight_decay": 0.0},
    )
    step = trainer.prepare(batch, "token")
    found: dict[int, torch.Tensor] = {}

    def read(output: Any) -> None:
        tokens = output.logprobs()
        for number in tokens.sequence_ids.unique().tolist():
            found[number] = tokens.logprobs[tokens.sequence_ids == number].clone()

    trainer.run(step.batches, read)
    exported = {name: tuple(tensor.shape) for name, tensor in trainer.weights.hf_tensors()}
    losses = [
        train_step(trainer, trainer.prepare(batch, "token").batches, sft_loss).metrics["loss"]
        for _ in range(6)
    ]
    return {
        "logprobs": [found[number].numpy() for number in range(len(sequences))],
        "losses": losses,
        "rows": trainer.decoder.rows,
        "microbatches": len(step.batches),
        "exported": exported,
        "shapes": trainer.architecture.hf_shapes(),
    }
