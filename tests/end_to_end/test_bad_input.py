"""Error messages for user errors: one line each, exit code 2, and nothing was started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import GRPO, ROOT, SFT, Command, write_config
from tests.processes import apart_from_waits

pytestmark = pytest.mark.timeout(1800)

# All cases run in one process: importing transformers takes most of the time.
DRIVER = """
import contextlib, io, json, sys
from megarl.cli import main
for arguments in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    started = [name for name in ("ray", "vllm", "megatron.core") if name in sys.modules]
    print(json.dumps({"code": code, "errors": errors.getvalue(), "started": started}))
"""


@dataclass
class Case:
    """A command on a configuration with one error, and the expected content of the line."""

    command: str
    says: tuple[str, ...]
    sections: dict[str, Any]
    model: str = "model"


def jsonl(path: str) -> dict[str, Any]:
    return {"data": {"train": {"source": "jsonl", "path": path}}}


CASES = {
    "misspelt key": Case(
        "grpo",
        ("optimizer.learning_rate", "here it is optimizer.lr"),
        {"optimizer": {"lr": 1e-3, "learning_rate": 1e-3}},
    ),
    "misspelt key of sft": Case("sft", ("training.batchsize", "batch_size"), {"training": {"batchsize": 8}}),
    "no model": Case("grpo", ("model.path", "no_model"), {}, model="no_model"),
    "no model for sft": Case("sft", ("model.path", "no_model"), {}, model="no_model"),
    "malformed jsonl": Case(
        "grpo", ("malformed_prompts.jsonl:3", "malformed JSON"), jsonl("malformed_prompts.jsonl")
    ),
    "malformed jsonl of sft": Case("sft", ("malformed.jsonl:2", "malformed JSON"), jsonl("malformed.jsonl")),
    "no answer": Case("grpo", ("no_answer.jsonl:2", "'answer'"), jsonl("no_answer.jsonl")),
    "empty jsonl": Case("grpo", ("data.train.path", "empty.jsonl", "no records"), jsonl("empty.jsonl")),
    "empty jsonl of sft": Case("sft", ("data.train.path", "empty.jsonl", "no records"), jsonl("empty.jsonl")),
    "prompt too long": Case("grpo", ("long.jsonl:2", "at most 90"), jsonl("long.jsonl")),
    "demonstration too long": Case("sft", ("long_sft.jsonl:1", "at most 96"), jsonl("long_sft.jsonl")),
    "ids beyond the vocabulary": Case(
        "grpo", ("model.path", "511", "500 entries"), {}, model="small_vocabulary"
    ),
    "ids beyond the vocabulary of sft": Case(
        "sft", ("model.path", "511", "500 entries"), {}, model="small_vocabulary"
    ),
}
FILES = {
    "malformed_prompts.jsonl": '{"prompt": "1 + 1", "answer": "2"}\n\n{"prompt": "1 + 2", "answer": }\n',
    "malformed.jsonl": '{"prompt": "1 + 1", "response": "2"}\n{"prompt": "1 + 2"\n',
    "no_answer.jsonl": '{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 + 2"}\n',
    "empty.jsonl": "\n",
    "long.jsonl": '{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "%s", "answer": "2"}\n' % ("1+" * 60 + "1"),
    "long_sft.jsonl": '{"prompt": "1 + 1", "response": "%s"}\n' % ("1" * 200),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, dict[str, Any]]:
    """Return each case's exit code, standard error, imports, and whether a run began."""
    folder = tmp_path_factory.mktemp("bad_input")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    shutil.copytree(model, folder / "model")
    shutil.copytree(model, folder / "small_vocabulary")
    config = json.loads((model / "config.json").read_text())
    (folder / "small_vocabulary" / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    commands = []
    for name, case in CASES.items():
        sections = json.loads(json.dumps(case.sections))
        if "data" in sections:
            sections["data"]["train"]["path"] = str(folder / sections["data"]["train"]["path"])
        path = write_config(
            folder / f"{name}.yaml",
            GRPO if case.command == "grpo" else SFT,
            run_dir=folder / "runs" / name,
            model=folder / case.model,
            **sections,
        )
        commands.append([case.command, "--config", str(path)])
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(lines) == len(CASES), finished.stderr
    return {
        name: {**outcome, "run_exists": (folder / "runs" / name).exists()}
        for name, outcome in zip(CASES, lines, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_started(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["code"] == 2, outcome
    [line] = apart_from_waits(outcome["errors"])
    assert line.startswith("error: ")
    for words in CASES[name].says:
        assert words in line
    assert not outcome["run_exists"]
    assert outcome["started"] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_itself_exits_with_2(tmp_path: Path, model: Path, processes: int) -> None:
    config = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=model)
    command = Command(
        "sft",
        "--config",
        config,
        f"parallel.num_processes={processes}",
        "optimizer.lr=-1",
        output=tmp_path / "log",
    )
    assert command.wait() == 2
    [line] = command.output.splitlines()
    assert "optimizer.lr" in line
    assert not (tmp_path / "run").exists()


def test_what_rank_0_finds_once_ranks_run_is_one_line(tmp_path: Path, model: Path) -> None:
    """The other rank is building its model meanwhile, and must end without output."""
    train = {**GRPO["data"]["train"], "size": 2048}  # nearly all the sums there are
    config = write_config(
        tmp_path / "grpo.yaml",
        GRPO,
        run_dir=tmp_path / "run",
        model=model,
        data={"train": train},
        evaluation={"num_prompts": 64},
    )
    command = Command("grpo", "--config", config, "parallel.num_processes=2", output=tmp_path / "log")
    assert command.wait() == 2
    [line] = [line for line in command.output.splitlines() if "error" in line.lower()]
    assert line.startswith("error: evaluation.num_prompts: 64 problems requested")
    assert "Traceback" not in command.output
