"""What comes out of files and models is printed as text: nothing of it moves the cursor or hides a line."""

from __future__ import annotations

import re
import time

import pytest

from megarl import terminal
from megarl.terminal import MAX_LINE, one_line, printable, working


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\twith a tab\nand a line", "plain text\twith a tab\nand a line"),
        ("größer 数 🙂", "größer 数 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("done\rFAILED", "done\\rFAILED"),
        ("\x9b31m", "\\x9b31m"),  # the one-byte form of ESC [
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\0b\ud83d", "a\\x00b\\ud83d"),
        ("\u2028\u2029\ufeff", "\\u2028\\u2029\\ufeff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode("utf-8")


def test_one_line_keeps_both_ends() -> None:
    line = one_line("begin\n" + "x" * 10**6 + "\nend")
    assert line.startswith("begin\\nxxx")
    assert line.endswith("xxx\\nend")
    assert len(line) < MAX_LINE + 60
    assert "\n" not in line


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting that says something after 0.05 s, and again after 0.1 s."""
    for name, seconds in (("_AT_ONCE", 0.05), ("_SHORT", 0.05), ("_TICK", 0.1), ("_LONG", 0.1)):
        monkeypatch.setattr(terminal, name, seconds)


def test_what_takes_long_is_said_in_lines(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    err, deadline = "", time.monotonic() + 60
    with working("reading"):
        while err.count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            err += capsys.readouterr().err
    out, rest = capsys.readouterr()
    assert out == ""
    lines = (err + rest).splitlines()
    assert lines[0] == "reading ..." and len(lines) >= 2
    assert all(re.fullmatch(r"reading \.\.\. \d+ s", line) for line in lines[1:])
    time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with working("reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_one_line_counts_and_disappears(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def fail() -> None:
        time.sleep(1.0)
        raise ValueError("an error")

    with pytest.raises(ValueError, match="an error"), working("reading"):
        fail()
    out, err = capsys.readouterr()
    assert (out, "\n" in err) == ("", False)
    shown = err.split("\r\x1b[2K")
    assert shown[0] == shown[-1] == "" and shown[1] == "reading ..." and len(shown) >= 4
