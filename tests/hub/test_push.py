"""`megarl push`: the commit that arrives on a hub, and what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megarl.cli import main
from megarl.config.chat_templates import CHAT_TEMPLATES
from megarl.config.data import PromptFormat
from megarl.config.hub import HubDirectory
from megarl.config.load import load_config
from megarl.config.sft import SftConfig
from megarl.runs.model_card import write_card, write_chat_template
from tests.hub.server import serve

FILES = {
    "README.md": b"---\nlibrary_name: transformers\n---\n",
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": bytes(range(256)) * 8,
}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A run directory with an export."""
    for name, content in FILES.items():
        file = tmp_path / "run" / "hf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "run" / "metrics.jsonl").write_text("not to be uploaded")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writes")
        running.writers = {"writes"}
        yield running


def test_what_arrives_is_the_export(hub, exported: Path, capsys) -> None:
    assert main(["push", str(exported), "org/mine"]) == 0
    assert hub.files["org/mine"]["main"] == FILES
    out = capsys.readouterr().out
    assert f"3 files, 2.11 KB: {exported}/hf -> org/mine\n" in out
    assert main(["push", str(exported / "hf"), "org/mine", "--revision", "step-50"]) == 0
    assert hub.files["org/mine"]["step-50"] == FILES


def test_a_dry_run_lists_the_same_and_needs_no_hub(exported: Path, capsys, monkeypatch) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("the hub was asked"))
    assert main(["push", str(exported), "org/mine", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "README.md          35 B",
        "config.json        23 B",
        "model.safetensors  2.05 KB",
        f"3 files, 2.11 KB: {exported}/hf -> org/mine",
        "dry run: nothing was uploaded",
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{run}", "mine"], "a repository is named org/name (got 'mine')"),
        (["{run}", "org/mine@v1"], "a repository is named org/name (got 'org/mine@v1')"),
        (
            ["{run}", "org/mine", "--adapter"],
            "adapter: no such directory; {run}/hf is there: leave out --adapter",
        ),
        (["{run}/none", "org/mine"], "none/hf: no such directory; a run exports at its end"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(exported: Path, capsys, arguments, error) -> None:
    assert main(["push", *(each.format(run=exported) for each in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert error.format(run=exported) in said


def test_a_token_that_may_not_write(hub, exported: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "reads")
    assert main(["push", str(exported), "org/mine"]) == 2
    assert f"{hub.url}/org/mine: HF_TOKEN may not write there" in capsys.readouterr().err
    assert hub.files == {}


def config_of(tmp_path: Path, kind=SftConfig, **sections):
    file = tmp_path / "c.yaml"
    basic = {"run": {"dir": "runs/tiny"}, "model": {"path": "models/m"}, "optimizer": {"lr": 1e-3}}
    file.write_text(yaml.safe_dump(basic | sections))
    return load_config(kind, file, check_files=False)


def test_the_card_says_what_the_model_is_made_of(tmp_path: Path) -> None:
    """Its head is what huggingface_hub reads."""
    from huggingface_hub import ModelCard

    config = config_of(
        tmp_path,
        data={
            "train": {"source": "hf", "dataset": "org/talks", "subset": "en"},
            "held_out": {"source": "jsonl", "path": "/home/someone/secret.jsonl"},
        },
        training={"num_epochs": 2, "batch_size": 4},
    )
    path = HubDirectory(str(tmp_path / "snapshots" / "abc123"), "org/base@v1")
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    write_card(tmp_path, "sft", config, {"sft_steps": 7, "loss": 1.25, "reference": None})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/talks"]
    assert card.data.tags == ["megarl", "sft"]
    assert card.data.library_name == "transformers"
    assert "`org/base@v1` (commit abc123)" in card.text
    assert "- `data.train`: org/talks, en, split train\n- `data.held_out`: secret.jsonl" in card.text
    assert "| loss | 1.25 |" in card.text
    settings = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["model"]["path"] == "org/base@v1"
    assert settings["training"]["num_epochs"] == 2


def test_a_model_without_a_template_gets_the_runs(tmp_path: Path) -> None:
    """With the EOS that ends its turns, for whoever serves it; a model with one keeps it."""
    vocabulary = {
        "model": {"vocab": {"a": 0, "<end>": 1}},
        "added_tokens": [{"content": "<|im_end|>", "id": 9}],
    }
    for name, content in {
        "tokenizer.json": vocabulary,
        "tokenizer_config.json": {"eos_token": "<end>"},
        "generation_config.json": {"eos_token_id": 1},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    write_chat_template(tmp_path, PromptFormat(chat_template=True))
    assert not (tmp_path / "chat_template.jinja").exists()
    write_chat_template(tmp_path, PromptFormat(chat_template="chatml"))
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATES["chatml"].text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "<|im_end|>"}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [9, 1]}
    write_chat_template(tmp_path, PromptFormat(chat_template="qwen3"))
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATES["chatml"].text
