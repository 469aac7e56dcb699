"""`megarl data inspect` on a configuration of each command, as text without colour and in colour."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megarl.cli import main
from megarl.jobs import JOBS
from tests.data import public_rows
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
    assert "megarl grpo or ppo, data.held_out: 64 problems" in out
    assert out.count("reference answer: '") == 2
    assert "dropped: none; bad rows: none" in out

    path.write_text(json.dumps({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}))
    packing = {"max_tokens_per_microbatch": 160, "max_sequence_length": 80}
    dpo = {**SFT, "algorithm": {"loss": "dpo"}, "packing": packing}
    config = write_config(tmp_path / "dpo.yaml", dpo, run_dir=tmp_path / "run", model=model, data=data)
    out = shown(capsys, config)
    assert "pair 0, chosen: 8 tokens, 3 learned" in out
    assert "1 + 1 =[[ 3<|end|>]]" in out


def test_a_stream_is_read_to_the_end_of_its_first_window(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By inspect, by --dry-run and by env try; row 4 is malformed."""
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"{n} + 1 =", "response": f" {n + 1}", "answer": n + 1}) for n in range(3)]
    path.write_text("\n".join([*rows, "{"]))
    stream = {"source": "jsonl", "path": str(path), "streaming": True, "streaming_window": 3}
    data = {"train": stream | {"row_format": "prompt_response"}}
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=model, data=data)
    out = shown(capsys, config, "-n", "9")
    assert "megarl sft, data.train: 3 sequences in the first 3 rows of a stream" in out
    assert all(f"{n} + 1 =[[ {n + 1}<|end|>]]" in out for n in range(3))
    assert "all of the first window" in out
    assert main(["sft", str(config), "--dry-run", "training.batch_size=3"]) == 0
    out = capsys.readouterr().out
    assert "3 sequences in the first 3 rows of jsonl" in out
    assert "40 steps of 3 sequences: 120 in all, of a stream of unknown length" in " ".join(out.split())
    assert main(["data", "inspect", str(config), "data.train.streaming_window=4"]) == 2
    assert "rows.jsonl:4: malformed JSON" in capsys.readouterr().err

    config = write_config(
        tmp_path / "grpo.yaml", GRPO, run_dir=tmp_path / "run", model=model, data={"train": stream}
    )
    assert main(["env", "try", str(config), "--problem", "2", "--answer", "3"]) == 0
    assert "2 + 1 =" in capsys.readouterr().out
    assert main(["env", "try", str(config), "--problem", "3", "--answer", "3"]) == 2
    assert "has 3 problems in the first 3 rows (got 3)" in capsys.readouterr().err


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


ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
ROWS = {  # the data that users bring themselves
    "math_train": {"prompt": "1 + 1 =", "answer": "2"},
    "math_test": {"prompt": "2 + 2 =", "answer": "4"},
    "sft_train": {"prompt": "1 + 1 =", "response": " 2"},
    "sft_test": {"prompt": "2 + 2 =", "response": " 4"},
    "pairs": {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
}


@pytest.fixture(scope="module")
def checkout(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: the shipped configurations, their data, and a tokenizer without weights."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data").mkdir()
    for name, row in ROWS.items():
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    guide = (ROOT / "docs" / "guides" / "environments.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (folder / "word_count.py").write_text(code)
    shutil.copytree(model, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors*"))
    sizes = json.loads((folder / "tokenizer" / "config.json").read_text())
    (folder / "tokenizer" / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 65536}))
    return folder


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_configuration(
    file: Path,
    checkout: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(checkout)
    [kind] = {*JOBS, "plan"} & set(file.stem.split("_")) - ({"sft", "dpo"} if "plan" in file.stem else set())
    arguments = [str(file.relative_to(ROOT)), "-n", "1", "model.path=tokenizer"]
    if file.stem in public_rows.ROWS:
        arguments += public_rows.stand_in(file.stem, tmp_path)
    if kind == "plan":
        assert main(["data", "inspect", *arguments]) == 2
        assert "it is a setting of megarl plan" in capsys.readouterr().err
        return
    if kind == "eval":
        arguments += ["--split", "held_out"]
    out = shown(capsys, *arguments)
    [names, noun] = re.findall(r"^megarl ([a-z or]+), data\.\w+: \d+ (\w+);", out)[0]
    assert kind in names.split(" or ")
    assert noun == JOBS[kind].data.noun
    examples = {"sequences": "sequence ", "pairs": "pair ", "problems": "problem "}
    assert re.search(rf"^-* ?{examples[noun]}\d+", out, re.MULTILINE), out
    assert "the run's longest sequence is" in out
