"""The reward model as an environment: equal to transformers' scores of the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import transformers

from megarl.config.environments import RewardModelConfig
from megarl.environments import grade, make_environment, needs_answer
from megarl.environments.base import VerifierError
from megarl.errors import UserError
from megarl.records import Prompt, token_ids


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("reward-model")
    words = {"<eos>": 0, "what": 1, "is": 2, "three": 3, "four": 4, "good": 5, "bad": 6}
    raw = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
    )
    model = transformers.LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.normal_(0, 1)
    model.save_pretrained(folder)
    return folder


def test_scores_are_those_of_transformers(directory: Path) -> None:
    config = RewardModelConfig(kind="reward_model", path=str(directory), scale=2.0)
    environment = make_environment(config, "data.train.environment")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    prompt = Prompt(0, "what is good", token_ids([1, 2, 5]))
    scores = []
    for text, ids in (("three", [3]), ("four bad", [4, 6]), ("", [])):
        reward, info = asyncio.run(grade(environment, prompt, text))
        expected = float(model(torch.tensor([[1, 2, 5, *ids, 0]])).logits[0, 0].detach())
        assert info["score"] == pytest.approx(expected, abs=1e-5)
        assert reward == pytest.approx(2 * expected, abs=1e-5)
        scores.append(reward)
    assert len(set(scores)) == 3
    assert not needs_answer(config)


def test_another_tokenizer_is_an_error_and_no_reward(directory: Path) -> None:
    config = RewardModelConfig(kind="reward_model", path=str(directory))
    environment = make_environment(config, "data.train.environment")
    with pytest.raises(VerifierError, match="reads the prompt's token ids as"):
        asyncio.run(grade(environment, Prompt(0, "what is good", token_ids([1, 2, 6])), "three"))


def test_what_is_no_reward_model_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.environment\.path: .*no config\.json"):
        make_environment(RewardModelConfig(kind="reward_model", path=str(tmp_path)), "data.train.environment")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no sequence classification model with one label"):
        make_environment(RewardModelConfig(kind="reward_model", path=str(tmp_path)), "data.train.environment")


def test_type_and_threads(directory: Path) -> None:
    """Scores in bfloat16 are transformers' of that type, and others than those in float32."""
    prompt, threads = Prompt(0, "what is good", token_ids([1, 2, 5])), torch.get_num_threads()
    scores: dict[str, float] = {}
    try:
        for number, dtype in ((1, "float32"), (2, "bfloat16")):
            config = RewardModelConfig(
                kind="reward_model", path=str(directory), dtype=dtype, num_threads=number
            )
            environment = make_environment(config, "data.train.environment")
            assert torch.get_num_threads() == number
            scores[dtype] = asyncio.run(grade(environment, prompt, "three"))[0]
    finally:
        torch.set_num_threads(threads)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    for dtype, score in scores.items():
        model = load(directory, dtype=getattr(torch, dtype)).eval()
        expected = float(model(torch.tensor([[1, 2, 5, 3, 0]])).logits[0, 0].detach())
        assert score == pytest.approx(expected, abs=1e-5 if dtype == "float32" else 1e-2)
    assert abs(scores["float32"] - scores["bfloat16"]) > 1e-4
