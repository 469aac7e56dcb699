"""`--dry-run` and `megarl env try`: what they say is what a run does, and what they refuse a run refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, SFT, write_config

pytestmark = pytest.mark.timeout(1800)


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, str]:
    """Label -> text of a dry run, with wrapped lines joined."""
    assert main([*map(str, arguments), "--dry-run"]) == 0
    lines: dict[str, str] = {}
    label = ""
    for line in capsys.readouterr().out.splitlines():
        label = line[:15].strip() or label
        lines[label] = f"{lines.get(label, '')} {line[15:]}".strip()
    return lines


def test_it_says_what_the_run_did(sft_run: FinishedRun, tmp_path: Path, capsys: Any) -> None:
    """Compared with the finished run's metrics, checkpoint and export."""
    lines = said(capsys, "sft", sft_run.config, f"run.dir={tmp_path / 'new'}")
    assert lines["run"] == f"{tmp_path / 'new'}: new"
    assert not (tmp_path / "new").exists()
    assert "40 steps of 16 sequences: 1.25 epochs; 40 optimizer steps" in lines["steps"]
    first = json.loads((sft_run.dir / "metrics.jsonl").read_text().splitlines()[0])
    assert f"the first step has {int(first['num_tokens']):,} tokens" in lines["tokens"]
    assert f"in {int(first['num_microbatches'])} microbatches of 160 tokens" in lines["tokens"]
    [rows] = re.findall(r"([\d,]+) sequences of reasoning_gym chain_sum", lines["data.train"])
    assert rows == "512"
    weights = os.path.getsize(sft_run.dir / "hf" / "model.safetensors")
    [count] = re.findall(r"([\d.]+)k parameters, float32; all are trained", lines["model"])
    assert float(count) * 1e3 * 4 == pytest.approx(weights, rel=0.02)
    assert "AdamW, lr 0.003, constant" in lines["optimizer"]
    assert set(lines["not default"].split(", ")) == {
        "packing.max_tokens_per_microbatch=160",
        "packing.max_sequence_length=96",
        "checkpoint.interval=0",
        "training.num_steps=40",
        "training.validation_size=32",
        "data.format.chat_template=false",
    }
    assert "note" not in lines
    new = f"run.dir={tmp_path / 'new'}"
    too_long = said(capsys, "sft", sft_run.config, new, "optimizer.lr_warmup_steps=41")
    assert "optimizer.lr_warmup_steps = 41 exceeds the run's 40 optimizer steps" in too_long["note"]
    assert said(capsys, "sft", sft_run.config)["run"].startswith(f"{sft_run.dir}: complete, 40 of 40 steps")


def test_checkpoints_have_the_size_it_says(sft_run: FinishedRun, tmp_path: Path) -> None:
    from megarl.config.load import load_config
    from megarl.config.sft import SftConfig
    from megarl.loops.dry_run import checkpoint_bytes
    from megarl.models import load_architecture

    config = load_config(SftConfig, sft_run.config)
    [checkpoint] = (sft_run.dir / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert checkpoint_bytes(config, load_architecture(config.model.path)) == pytest.approx(written, rel=0.15)


def test_an_online_run(model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model)
    lines = said(capsys, "grpo", config)
    assert "4 steps of 4 prompts x 4 samples: 0.25 epochs" in lines["steps"]
    assert "before the first step and at the end: 8 held-out problems" in lines["evaluation"]
    assert "reference answer gets 1, an empty response gets 0" in lines["environment"]
    # 2 layers x 2 (keys, values) x 1 head x 32 x 4 bytes: the engine's cache is what was asked
    assert "kv cache 0.05" in lines["memory"]
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("megarl.cluster.limits.available_memory", lambda: 2**20)
    assert "DOES NOT FIT HERE, 0.00 available here" in said(capsys, "grpo", config)["memory"]


MISTAKES = {
    "no_such_task": (["data.train.task=no_such_task"], "data.train.task: "),
    "too long": (["packing.max_sequence_length=20", "rollout.max_new_tokens=6"], "the prompt has"),
    "held out": (["data.held_out.arguments={min_term: 2}"], "data.held_out.arguments"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_data_refuses_is_refused(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, message = MISTAKES[name]
    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model)
    assert main(["grpo", str(config), "--dry-run", *settings]) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: ") and message in error


def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Settings with the reward functions of a module ``name``: one that works, and one that does not."""
    (tmp_path / f"{name}.py").write_text(
        "def length(prompt, response, answer):\n    return len(response) / 10\n\n"
        "def same(prompt, response, answer):\n    return float(response == answer)\n\n"
        "def first(prompt, response, answer):\n    return ord(response[0])\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    environment = {"kind": "function", "paths": [f"{name}:length", f"{name}:same"], "weights": [1, 2]}
    source = {"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "environment": environment}
    return [f"data.train={json.dumps(source)}", "rollout.num_prompts_per_step=1"]


def test_a_reward_is_tried(model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = rewards(tmp_path, monkeypatch, "rewards_to_try")
    config = str(write_config(tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model))
    asked = ["env", "try", config, *settings]
    assert main([*asked, "--answer", "2"]) == 0
    out = capsys.readouterr().out
    assert "prompt: 1 + 1 =\nreference answer: 2\n" in out
    assert "  length: 0.1\n  same: 1.0\n" in out
    assert out.endswith("reward: 2.1\n")
    assert main([*asked, "--answer", "five", "--json"]) == 0
    episode = json.loads(capsys.readouterr().out)
    assert (episode["reward"], episode["done"]) == (0.4, True)
    assert episode["turns"][0]["info"] == {"length": 0.4, "same": 0.0}
    said_of_it = said(capsys, "grpo", config, *settings)["environment"]
    assert (
        "data.train: function; the first problem's reference answer gets 2.1, an empty response gets 0"
        in (said_of_it)
    )
    wrong = [each.replace("rewards_to_try:length", "rewards_to_try:first") for each in settings]
    assert main(["grpo", config, "--dry-run", *wrong]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: data.train: step raised IndexError: string index out of range"
    assert main([*asked, "--problem", "1", "--answer", "2"]) == 2
    assert "--problem: data.train has 1 problems (got 1)" in capsys.readouterr().err


def test_a_game_is_played(model: Path, tmp_path: Path, capsys: Any) -> None:
    """The number guessing game, whose secret is the reference answer: two guesses, the second right."""
    game = {"source": "environment", "environment": {"kind": "number_guessing"}, "size": 8}
    config = write_config(
        tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model, data={"train": game}
    )
    assert main(["env", "try", str(config), "--answer", "0", "--json"]) == 0
    secret = int(json.loads(capsys.readouterr().out)["answer"])
    other = secret - 1 if secret > 1 else secret + 1
    assert main(["env", "try", str(config), "--answer", str(other), "--answer", str(secret), "--json"]) == 0
    episode = json.loads(capsys.readouterr().out)
    hint = "higher" if other < secret else "lower"
    assert hint in episode["turns"][0]["observation"].lower()
    assert (len(episode["turns"]), episode["done"], episode["turns"][1]["observation"]) == (2, True, None)
    assert episode["reward"] > 0


def test_a_configuration_without_an_environment(tmp_path: Path, model: Path, capsys: Any) -> None:
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=model)
    assert main(["env", "try", str(config), "--answer", "2"]) == 2
    assert "rollout: required but missing" in capsys.readouterr().err
