"""`megarl data inspect` on a configuration of each command, as text without colour and in colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from tests.end_to_end.harness import GRPO, SFT, write_config

pytestmark = pytest.mark.timeout(1800)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["data", "inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_every_kind_of_data(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "1 + 1 =", "response": " 2"}, {"prompt": "7"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"source": "jsonl", "path": str(path)}, "on_bad_row": "skip"}
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=model, data=data)
    out = shown(capsys, config, "-n", "1")
    assert "megarl sft, data.train: 1 sequences" in out
    assert "1 + 1 =[[ 2<|end|>]]" in out
    assert "sequence 0: 8 tokens, 3 learned" in out
    assert f"data.train: 1 bad of 2 rows skipped (data.on_bad_row):\n  {path}:2: no field 'response'" in out

    config = write_config(tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model)
    out = shown(capsys, config, "--split", "held_out", "-n", "2")
    assert "megarl grpo, data.held_out: 64 problems" in out
    assert out.count("reference answer: '") == 2
    assert "dropped: none; bad rows: none" in out

    path.write_text(json.dumps({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}))
    packing = {"max_tokens_per_microbatch": 160, "max_sequence_length": 80}
    dpo = {**SFT, "algorithm": {"loss": "dpo"}, "packing": packing}
    config = write_config(tmp_path / "dpo.yaml", dpo, run_dir=tmp_path / "run", model=model, data=data)
    out = shown(capsys, config)
    assert "pair 0, chosen: 8 tokens, 3 learned" in out
    assert "1 + 1 =[[ 3<|end|>]]" in out


def test_colour_and_what_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=model)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;32m" in shown(capsys, config, "-n", "1")
    assert main(["data", "inspect", str(config), "--split", "held_out", "data.held_out=null"]) == 2
    assert "data.held_out: missing" in capsys.readouterr().err
    assert main(["data", "inspect", str(config), "optimizer.lr=x"]) == 2
    assert "(read as a configuration of megarl sft; --for names another)" in capsys.readouterr().err
