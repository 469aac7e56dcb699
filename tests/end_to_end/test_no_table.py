"""GRPO of a family without a table: FSDP in the trainer, vLLM's own loader in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.harness import GRPO, column, run, write_config


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_phi3_is_rolled_out_by_vllm(tmp_path: Path, model: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    config = transformers.Phi3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    tokenizer.save_pretrained(tmp_path / "phi3")
    training = {"num_steps": 3}
    path = write_config(
        tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=tmp_path / "phi3", training=training
    )
    settings = ("trainer.backend=torch", "parallel.num_processes=2", "weights.verify=checksum")
    output = run("grpo", "--config", path, *settings, output=tmp_path / "grpo.log")
    assert "load_weights at every sync" in output
    assert len(column(tmp_path / "run", "loss")) == 3
    assert max(column(tmp_path / "run", "logprob_abs_diff_max")) < 1e-4
