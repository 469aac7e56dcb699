"""Configurations on public data: a dry run and the first examples, on rows with the hub's columns."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from megarl.cli import main
from megarl.config.load import load_config
from megarl.data.tokenizer import apply_format, load_tokenizer
from megarl.jobs import JOBS
from tests.hub.server import FakeHub, ask, serve

CONFIGS = Path(__file__).parents[2] / "configs"
# Qwen2.5-1.5B's and 0.5B's config.json; the distillate of DeepSeek-R1 has the former's sizes.
SIZES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
}
COMMON = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows(name: str) -> list[dict[str, Any]]:
    """Three rows with the columns, and the kinds of values, that the data set has on the hub."""
    made = []
    for i in range(3):
        answer = str(7 + i)
        talk = turns(f"What is {i} + 7?", answer)
        made.append(
            {
                "allenai/tulu-3-sft-mixture": {"id": f"p_{i}", "messages": talk, "source": "ai2-adapt-dev/x"},
                "trl-lib/ultrafeedback_binarized": {
                    "chosen": talk,
                    "rejected": turns(talk[0]["content"], "No idea."),
                    "score_chosen": 8.5,
                    "score_rejected": 2.0,
                },
                "agentica-org/DeepScaleR-Preview-Dataset": {
                    "problem": f"Find ${i} + 7$.",
                    "answer": answer,
                    "solution": f"It is $\\boxed{{{answer}}}$.",
                },
            }[name]
        )
    return made


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location(
        "make_tiny_model", CONFIGS.parent / "tools/make_tiny_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_model"] = module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tokenizer")
    module.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path, tokenizer_files):
    """The models of the recipes without weights, their data sets' rows, and a directory to work in."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(
        name: str, subset: str | None = None, *, split: str, revision: str | None = None, streaming: bool
    ) -> Any:
        assert not streaming
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(rows(name))

    with serve() as running:
        ask(running.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.chdir(tmp_path)
        running.asked = asked
        yield running


def put_model(hub: FakeHub, path: str, tokenizer_files: Path) -> None:
    """The model's sizes with the quickstart's tokenizer, without weights."""
    config = COMMON | SIZES["0.5B" if "0.5B" in path else "1.5B"]
    files = {file.name: file.read_bytes() for file in tokenizer_files.iterdir()}
    hub.files[path] = {"main": files | {"config.json": json.dumps(config).encode()}}


RECIPES = {
    "sft_tulu3": ("What is 0 + 7?", "7<|end|>"),
    "dpo_ultrafeedback": ("What is 0 + 7?", "7<|end|>"),
    "grpo_tools": ("Find $0 + 7$.", "7"),
}


def read(config: Any, split: str) -> tuple[Any, Any]:
    """The examples of a split, and the tokenizer."""
    job = next(job for job in JOBS.values() if isinstance(config, job.root()))
    tokenizer = load_tokenizer(config.model.path)
    apply_format(tokenizer, config.data.format)
    longest = config.packing.max_sequence_length
    return job.data.loader()(config, tokenizer, longest, split), tokenizer


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_the_rows_of_its_data_set(name: str, hub, tokenizer_files, capsys) -> None:
    file, job = CONFIGS / f"{name}.yaml", name.split("_")[0]
    path = load_config(JOBS[job].root(), file, check_files=False).model.path
    put_model(hub, path, tokenizer_files)
    assert main([job, "--config", str(file), "--dry-run"]) == 0, capsys.readouterr().err
    assert f"{path}: qwen2, 1.54B parameters" in (out := capsys.readouterr().out) or "0.5B" in path
    assert "epochs" in out
    config = load_config(JOBS[job].root(), file, check_weights=False)
    prompt, learned = RECIPES[name]
    for split in ("train", "held_out") if config.data.held_out is not None else ("train",):
        examples, tokenizer = read(config, split)
        assert len(examples) == 3
        first = examples[0]
        if job == "grpo":
            assert first.metadata["answer"] == learned
            assert prompt in first.text
            continue
        sequence = first.chosen if job == "dpo" else first
        pairs = list(zip(sequence.token_ids, sequence.loss_mask, strict=True))
        assert tokenizer.decode([t for t, m in pairs if m]) == learned
        assert prompt in tokenizer.decode([t for t, m in pairs if not m])
        if job == "dpo":
            assert tokenizer.decode(first.rejected.token_ids).endswith("No idea.<|end|>")
