"""A job is one record: one registered elsewhere is known to everything that lists jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megarl import cli, jobs
from megarl.config.sft import SftConfig
from megarl.jobs import JOBS, Column, Job, job_with_sections
from megarl.metrics.report_data import read_run
from megarl.records import StepMetrics
from megarl.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]

# All of a new job but its test: in the tree, config/count.py, algorithms/count.py and the record in jobs.py.
COUNT = """
from megarl.config.sft import SftConfig
from megarl.config.section import PositiveInt, Section

class CountingConfig(Section):
    \"""How to count.\"""

    first_number: PositiveInt = 1
    \"""Where counting begins.\"""

class CountConfig(SftConfig):
    \"""Root of `megarl count`.\"""

    counting: CountingConfig = CountingConfig()

def run_count(config: CountConfig) -> None:
    print("counting from", config.counting.first_number)
"""


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "count_job.py").write_text(COUNT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "count_job", raising=False)
    job = Job(
        "count",
        "counting, for a test",
        config="count_job:CountConfig",
        run="count_job:run_count",
        data=jobs.SEQUENCES,
        columns=(Column({"step": "step"}, "count", 6), Column({"number": "number"}, "fixed", 8)),
        example="count.yaml",
        trains=False,
    )
    monkeypatch.setitem(JOBS, "count", job)
    return job


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "quickstart_sft.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text + "counting: {first_number: 7}\n")
    (tmp_path / "model").mkdir()
    for name, content in {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}.items():
        (tmp_path / "model" / name).write_text(content)
    return "c.yaml"


def test_the_command_line_runs_it(count: Job, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert "counting, for a test" in listed
    assert "megarl count --config count.yaml" in listed
    assert cli.main(["count", "--config", config, "model.path=model", "counting.first_number=9"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "megarl count: runs/quickstart/sft | model float32",
        "counting from 9",
    ]


def test_mistakes_are_explained(count: Job, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["counting.first_numbr=9", "optimizer.min_lr=1"]
    assert cli.main(["count", "--config", config, "model.path=model", *wrong]) == 2
    said = capsys.readouterr().err
    assert "counting.first_numbr: unknown key; did you mean counting.first_number?" in said
    assert "optimizer.min_lr: must not exceed optimizer.lr" in said  # rules of the sections it shares
    assert cli.main(["sft", "--config", config, "model.path=model"]) == 2
    assert "counting: unknown key here; it is a setting of megarl count" in capsys.readouterr().err


def test_console_report_and_docs_know_it(
    count: Job, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megarl.config.load import load_config
    from megarl.metrics.console import Console

    Console("count").step(StepMetrics(3, {"number": 5.0}))
    assert capsys.readouterr().out.split() == ["step", "number", "3", "5.0000"]
    loaded = load_config(count.root(), config, check_files=False)
    with RunDirectory(tmp_path / "run") as run:
        run.open(loaded.model_dump(mode="json"))
    assert read_run(tmp_path / "run").kind == "count"
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import make_config_docs
    finally:
        sys.path.remove(str(ROOT / "tools"))
    pages = make_config_docs.Pages().render()
    assert "megarl count --config count.yaml" in pages["configuration/count.md"]
    assert "Where counting begins." in pages["configuration/count.md"]


def test_data_inspect_takes_it_for_what_it_is(
    count: Job, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "inspect", config, "--for", "count", "counting.first_number=x"]) == 2
    said = capsys.readouterr().err
    assert "counting.first_number: expected an integer >= 1 (got 'x')" in said
    assert cli.main(["data", "inspect", config, "optimizer.lr=x"]) == 2
    assert "(read as a configuration of megarl count; --for names another)" in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_record_names_what_there_is(job: Job) -> None:
    assert callable(job.loop())
    assert callable(job.data.loader())
    root = job.root()
    assert root.__doc__.startswith(f"Root of `megarl {job.name}`")
    assert job_with_sections(root.model_fields) is job
    # A run directory written before its youngest section existed, or by a newer MegaRL.
    assert job_with_sections(root.model_fields.keys() - {"debug"} | {"from_the_future"}) is job


def test_a_job_is_told_by_the_sections_it_needs() -> None:
    assert job_with_sections(["run", "model", "training"]).name == "sft"
    assert job_with_sections(["run", "model", "training", "rollout"]).name == "grpo"
    assert issubclass(JOBS["sft"].root(), SftConfig)
