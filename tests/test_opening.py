"""The first line of a run, and the switch of how much it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl import cli
from megarl.config.grpo import GrpoConfig
from megarl.config.sft import SftConfig
from megarl.jobs import JOBS
from megarl.metrics import console
from megarl.opening import opening

PATH = "configs/models/qwen3_8b"
ROWS = {"source": "jsonl", "path": "README.md"}


COMMON: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": PATH, "dtype": "bfloat16"},
    "optimizer": {"lr": 1e-6},
    "data": {"train": ROWS},
}


def sft() -> SftConfig:
    return SftConfig.model_validate(COMMON | {"training": {"num_steps": 1200, "batch_size": 64}})


def test_it_says_what_runs_where(tmp_path: Path) -> None:
    model = f"{PATH} (8.19B parameters, bfloat16)"  # 8,190,735,360, as its model card counts them
    assert opening(JOBS["sft"], sft()) == f"megarl sft: runs/x | {model} | 1,200 steps of 64 sequences"
    rollout = {"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 64}
    grpo = GrpoConfig.model_validate(
        COMMON
        | {"rollout": rollout, "training": {"num_steps": 5}, "parallel": {"num_processes": 2}}
        | {"data": {"train": {"source": "reasoning_gym", "task": "chain_sum"}}}
    )
    assert (
        opening(JOBS["grpo"], grpo)
        == f"megarl grpo: runs/x | {model} | 5 steps of 8 x 4 samples | 2 processes"
    )
    unknown = SftConfig.model_validate(sft().model_dump() | {"model": {"path": str(tmp_path)}})
    assert f"| {tmp_path} float32 |" in opening(JOBS["sft"], unknown)


@pytest.mark.parametrize(
    ("switches", "level"), [([], "normal"), (["-q"], "quiet"), (["--quiet"], "quiet"), (["-v"], "verbose")]
)
def test_quiet_and_verbose(monkeypatch: pytest.MonkeyPatch, switches: list[str], level: str) -> None:
    monkeypatch.setattr(console, "_level", "normal")
    found = []
    monkeypatch.setattr(cli, "_call_loop", lambda job, config: found.append(console.Console(job.name)._level))
    monkeypatch.setattr(cli, "_check_machine", lambda *_: None)
    monkeypatch.setattr("megarl.config.load.load_config", lambda *_, **__: sft())
    assert cli.main(["eval", *switches, "run.seed=1"]) == 0
    assert found == [level]


def test_both_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "--quiet", "--verbose"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
