"""A dry run of a hub id of a family without a table: no weights are downloaded, and sizes are said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.cli import main
from tests.hub.conftest import CONFIG
from tests.hub.server import FakeHub

STABLELM = CONFIG | {"model_type": "stablelm", "vocab_size": 512, "use_cache": False}


@pytest.fixture
def settings(hub: FakeHub, tmp_path: Path) -> list[str]:
    from tools.make_tiny_model import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    hub.files["org/stable"] = {"main": files | {"config.json": json.dumps(STABLELM).encode()}}
    data = "data.train={source: reasoning_gym, task: chain_sum, size: 64, seed: 0}"
    run = ["run.dir=run", "optimizer.lr=1e-3", "training.num_steps=2", "training.batch_size=4"]
    return [*run, "model.path=org/stable", data, "data.format.chat_template=false"]


def test_the_torch_backend_takes_it(
    hub: FakeHub, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *settings, "trainer.backend=torch", "--dry-run"]) == 0
    said = capsys.readouterr().out
    heads, size = 2 * 32, 64  # q and o have 64 x 64, k and v half of it
    count = 2 * 512 * size + 3 * heads * size + 3 * size * 64 + 3 * 2 * size
    assert (
        f"model          org/stable: stablelm, {count / 1e3:.3g}k parameters, float32; all are trained"
        in said
    )
    assert "\ndisk " in said and not any(name.endswith(".safetensors") for name in hub.gets)


def test_the_megatron_backend_names_the_other(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *settings, "--dry-run"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "model_type 'stablelm' is not supported" in line
    assert "trainer.backend=torch trains most models that transformers has" in line
