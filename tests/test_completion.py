"""`megarl completion`: a real bash asks the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import cli
from megarl.completion import SHELLS

ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the command `megarl`, and what `megarl completion bash` prints."""
    folder = tmp_path_factory.mktemp("completion")
    command = folder / "megarl"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m megarl "$@"\n')
    command.chmod(0o755)
    printed = subprocess.run([str(command), "completion", "bash"], capture_output=True, text=True, check=True)
    (folder / "completion.bash").write_text(printed.stdout)
    (folder / "mine.yaml").write_text("")
    (folder / "other.txt").write_text("")
    return folder


def completed(programs: Path, line: str) -> list[str]:
    """What bash offers at the end of ``line``."""
    words = line.split(" ")
    script = f"""
        source completion.bash
        COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
        COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
        _python_argcomplete megarl {words[-1]!r} {words[-2]!r}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=programs, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megarl comp", ["compare", "completion"]),
        ("megarl sft --dry", ["--dry-run"]),
        ("megarl grpo optimizer.lr_", ["optimizer.lr_schedule=", "optimizer.lr_warmup_steps="]),
        ("megarl grpo -c mi", ["mine.yaml"]),
        ("megarl sft mi", ["mine.yaml"]),
        ("megarl env try mi", ["mine.yaml"]),
        ("megarl completion f", ["fish"]),
    ],
)
def test_bash_completes(programs: Path, line: str, expected: list[str]) -> None:
    assert completed(programs, line) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_its_own(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    mark = {"bash": "complete ", "zsh": "compdef", "fish": "complete --command megarl"}[shell]
    assert mark in printed and "megarl" in printed
