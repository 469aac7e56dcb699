"""The tiny model's directory as a user of transformers sees it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "make_tiny_model.py"


def build(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), "--output", str(output), *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "tiny"
    result = build(output, "--seed", "1")
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    "text",
    [
        "State the final answer: 12 + 345 - 6 =",
        " leading,  double  spaces and a trailing one ",
        "line\n\nbreaks\tand\ttabs\r\n",
        "isn't it 1,000.50% of x_2?",
        "".join(map(chr, range(32, 127))),
        "naïve Zürich — ½ ≤ √2 日本語 😀 \u200d\ufeff\x00\x7f",
        "<|end|> <|user|>3",
    ],
)
def test_every_text_survives(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 512


def test_every_task_s_questions_survive_in_few_tokens(tokenizer):
    for task in ("chain_sum", "gcd", "basic_arithmetic", "letter_counting", "spell_backward"):
        for entry in reasoning_gym.create_dataset(task, seed=123, size=20):
            assert tokenizer.decode(tokenizer(entry["question"])["input_ids"]) == entry["question"]
    words = "State the final answer to the following arithmetic problem:"
    assert len(tokenizer(words)["input_ids"]) == len(words.split()) + 1  # and the colon


def test_digits_stand_alone_and_are_the_same_everywhere(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list("0123456789"))
    assert len(set(ids)) == 10
    for text in ("1234567890", "x1y2z3", " 4 + 5=67,890"):
        kept = [i for i in tokenizer(text)["input_ids"] if i in ids]
        assert [str(ids.index(i)) for i in kept] == [c for c in text if c.isdigit()]


def test_specials_and_template(tokenizer):
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}], tokenize=False
    )
    assert text == "<|user|>1 + 1<|end|><|assistant|>2<|end|>"
    with pytest.raises(Exception, match="role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "a"}], tokenize=False)


def test_the_model_is_a_small_qwen3_in_fp32(directory, tokenizer):
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == (
        tokenizer.eos_token_id
    )
    tensors = load_file(directory / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert "lm_head.weight" not in tensors
    assert "model.layers.0.self_attn.q_norm.weight" in tensors
    assert 0.5e6 < sum(t.numel() for t in tensors.values()) < 3e6

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer("1 + 2 =", return_tensors="pt")["input_ids"]
    logits = model(ids).logits
    # Random weights, tied head: spread out a little, far from a certain answer.
    assert torch.isfinite(logits).all()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (entropy > 5.0).all()  # log(512) is 6.2


def test_the_seed_decides_every_byte(directory, tmp_path):
    def digests(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    assert build(tmp_path / "again", "--seed", "1").returncode == 0
    assert digests(tmp_path / "again") == digests(directory)
    assert build(tmp_path / "again", "--seed", "2").returncode == 0  # replaces it
    changed = digests(tmp_path / "again")
    assert {n for n, d in digests(directory).items() if changed[n] != d} == {"model.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "1", "--heads", "3", "--kv-heads", "2"], "--heads 3 is not a multiple of --kv-heads 2"),
        (["--seed", "1", "--layers", "0"], "--layers must be at least 1"),
        (["--seed", "1", "--head-dim", "31"], "--head-dim 31 must be even"),
    ],
)
def test_sizes_that_make_no_model_are_refused(tmp_path, arguments, words):
    result = build(tmp_path / "bad", *arguments)
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "bad").exists()


def test_another_directory_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = build(tmp_path, "--seed", "1")
    assert result.returncode == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
