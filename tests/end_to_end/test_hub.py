"""A run whose model and data are on a hub: one process downloads, all ranks train as from the files."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.end_to_end.harness import SFT, Command, column, write_config
from tests.hub.server import serve


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks_train_a_model_of_the_hub(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{a} + {b} =", "response": str(a + b)} for a in range(10) for b in range(10)]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    (tmp_path / "rows.parquet").write_bytes(table.getvalue())
    sections = {
        "training": {"num_steps": 2, "batch_size": 8},
        "parallel": {"num_processes": 2},
        "data": {"train": {"source": "file", "path": str(tmp_path / "rows.parquet")}, "held_out": None},
    }
    config = write_config(tmp_path / "here.yaml", SFT, run_dir=tmp_path / "here", model=model, **sections)
    assert Command("sft", "--config", config, output=tmp_path / "here.log").wait() == 0
    with serve() as hub:
        hub.files["org/tiny"] = {
            "main": {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}
        }
        hub.files["datasets/org/sums"] = {"main": {"data/train-00000-of-00001.parquet": table.getvalue()}}
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)
        sections["data"]["train"] = {"source": "hf", "dataset": "org/sums"}
        config = write_config(
            tmp_path / "hub.yaml", SFT, run_dir=tmp_path / "hub", model=Path("org/tiny"), **sections
        )
        command = Command("sft", "--config", config, output=tmp_path / "hub.log")
        assert command.wait() == 0, command.output
        assert hub.gets["model.safetensors"] == 1
        assert "model.path: org/tiny is " in command.output
    assert column(tmp_path / "hub", "loss") == column(tmp_path / "here", "loss")
    assert yaml.safe_load((tmp_path / "hub" / "config.yaml").read_text())["model"]["path"] == "org/tiny"
    # All is in the cache now: the finished run is longer without the hub, from where it ended.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = Command("sft", "--config", config, "training.num_steps=3", output=tmp_path / "offline.log")
    assert command.wait() == 0, command.output
    assert len(column(tmp_path / "hub", "loss")) == 3
