"""The notebook of the documentation runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from megarl.run_directory import read_metrics

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_it_is_shipped_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs from one kernel, the third resuming the second; what it prints is what the runs wrote."""
    import nbclient
    import nbformat

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1000, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    streams = ["".join(out.text for out in cell.outputs if out.output_type == "stream") for cell in code]
    runs = tmp_path / "runs" / "notebook"
    losses = [row["loss"] for row in read_metrics(runs / "sft")]
    assert len(losses) == 40
    assert streams[2] == f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}\n"
    assert losses[-1] < 0.5 * losses[0]
    assert "40" in streams[1], "the run's lines appear in the notebook"
    rewards = {row["step"]: round(row["reward_mean"], 3) for row in read_metrics(runs / "grpo")}
    assert list(rewards) == [1, 2, 3, 4, 5, 6]
    assert ast.literal_eval(streams[-1]) == rewards
    assert "Resuming from" in streams[4]
    shown = [out.data for cell in code for out in cell.outputs if "data" in out]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert len(tables) == 2 and all("report.html" in table for table in tables)
    assert (runs / "grpo" / "hf" / "config.json").is_file()
