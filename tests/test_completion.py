"""`megarl completion`: a real bash asks the real command."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from megarl import cli
from megarl.completion import SHELLS

ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the command `megarl`, and what `megarl completion SHELL` prints."""
    folder = tmp_path_factory.mktemp("completion")
    command = folder / "megarl"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m megarl "$@"\n')
    command.chmod(0o755)
    for shell in SHELLS:
        printed = subprocess.run([command, "completion", shell], capture_output=True, text=True, check=True)
        (folder / f"completion.{shell}").write_text(printed.stdout)
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


LINES = [
    ("megarl comp", ["compare", "completion"]),
    ("megarl sft --dry", ["--dry-run"]),
    ("megarl grpo optimizer.lr_", ["optimizer.lr_schedule=", "optimizer.lr_warmup_steps="]),
    ("megarl grpo -c mi", ["mine.yaml"]),
    ("megarl sft mi", ["mine.yaml"]),
    ("megarl env try mi", ["mine.yaml"]),
    ("megarl completion f", ["fish"]),
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash_completes(programs: Path, line: str, expected: list[str]) -> None:
    assert completed(programs, line) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish_completes(programs: Path, line: str, expected: list[str], tmp_path: Path) -> None:
    """`complete -C` is what fish offers at the end of a line: a candidate and its description per line."""
    script = f"source completion.fish; complete -C {line!r}"
    environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(
        command, cwd=programs, env=environ, capture_output=True, text=True, timeout=300, check=True
    )
    assert [each.partition("\t")[0] for each in done.stdout.splitlines()] == expected


@pytest.fixture(scope="module")
def zsh(
    programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[str, str]]]:
    """A zsh at a terminal: returns what it shows after Tab at the end of a line, and the line then."""
    if shutil.which("zsh") is None:
        pytest.skip("no zsh")
    home = str(tmp_path_factory.mktemp("home"))
    environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": home, "TERM": "dumb"}
    main, side = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"],
        cwd=programs,
        env=environ,
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)

    def read(mark: str) -> str:
        text, until = "", time.monotonic() + 120
        while mark not in text:
            assert time.monotonic() < until, text
            if select.select([main], [], [], 1)[0]:
                text += os.read(main, 65536).decode(errors="replace")
        return text

    def tab(line: str) -> tuple[str, str]:
        os.write(main, f"{line}\t".encode())
        # Keys wait until the completion is there: to the line's beginning, and print its words.
        os.write(main, b"\x01print -r -- 'line:' \x05 :end\n")
        text = read(" :end\r\n")
        [words] = re.findall(r"^line: (.*) :end\r$", text, re.MULTILINE)
        return text, words

    os.write(
        main, b"PS1='%% '; unsetopt zle_bracketed_paste PROMPT_SP; autoload -U compinit && compinit -u -D\n"
    )
    os.write(main, b"source completion.zsh; print -r -- 're'ady\n")
    read("\nready\r\n")
    yield tab
    shell.kill()
    shell.wait()
    os.close(main)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_zsh_completes(zsh: Callable[[str], tuple[str, str]], line: str, expected: list[str]) -> None:
    """One candidate ends up in the line, several in a list below it and what they share in the line."""
    shown, completed_line = zsh(line)
    *before, _ = line.split(" ")
    shared = "".join(
        letters[0] for letters in takewhile(lambda each: len(set(each)) == 1, zip(*expected, strict=False))
    )
    assert completed_line.split() == [*before, shared]
    if len(expected) > 1:
        listed = {word for each in shown.splitlines() for word in each.split()}
        assert listed >= set(expected)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_its_own(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    mark = {"bash": "complete ", "zsh": "compdef", "fish": "complete --command megarl"}[shell]
    assert mark in printed and "megarl" in printed
