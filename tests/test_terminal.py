"""What comes out of files and models is printed as text: nothing of it moves the cursor or hides a line."""

from __future__ import annotations

import pytest

from megarl.terminal import MAX_LINE, announce, one_line, printable


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


def test_what_takes_long_is_said_to_people_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce("reading")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    announce("reading")
    assert capsys.readouterr() == ("", "reading ...\n")
