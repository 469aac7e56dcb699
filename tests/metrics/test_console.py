"""The console: aligned lines, no control codes off a terminal, silence on other ranks."""

from __future__ import annotations

import io
import re

import pytest

from megarl.metrics import console as console_module
from megarl.metrics.console import Console
from megarl.records import StepMetrics

GRPO = {
    "reward_mean": 0.4375,
    "accuracy": 0.617,
    "kl_ref": 1.23e-4,
    "logprob_abs_diff_max": 3.1e-5,
    "grad_norm": 0.84,
    "lr": 1e-5,
    "response_length_mean": 14.25,
    "num_tokens": 9000,
    "seconds": 2.0,
}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_off_a_terminal_are_plain_aligned_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # even then: a log file is not a terminal
    stream = io.StringIO()
    console = Console("grpo", stream=stream)
    console.step(StepMetrics(7, GRPO))
    without = {name: value for name, value in GRPO.items() if name != "accuracy"}
    console.step(StepMetrics(1234, without | {"grad_norm": 12345.678, "kl_ref": float("nan")}))
    console.warn("mind [the] gap")
    with console.progress("rollout", total=8) as advance, console.waiting("engine"):
        advance(8)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    header, first, second, warning, waited = text.splitlines()
    titles = re.split(r"\s{2,}", header.strip())
    shown = dict(zip(titles, first.split(), strict=True))
    assert shown == {
        "step": "7",
        "reward": "0.4375",
        "accuracy": "61.7%",
        "kl ref": "1.2e-04",
        "logp diff": "3.1e-05",
        "grad norm": "0.8400",
        "lr": "1.0e-05",
        "length": "14.250",
        "tok/s": "4,500",
        "seconds": "2.0",
    }
    again = dict(zip(titles, second.split(), strict=True))
    assert (again["accuracy"], again["kl ref"], again["grad norm"]) == ("-", "nan", "12345.68")
    ends = [match.end() for match in re.finditer(r"\S+", first)]
    assert ends == [match.end() for match in re.finditer(r"\S+", second)]
    assert len(header) == len(first) == len(second)
    assert warning == "WARNING: mind [the] gap"
    assert waited.startswith("engine: ready after ")


def test_sft_columns_and_a_kl_without_reference() -> None:
    stream = io.StringIO()
    Console("sft", stream=stream).step(
        StepMetrics(1, {"loss": 2.5, "lr": 0.0, "num_tokens": 10, "seconds": 1.0})
    )
    header, line = stream.getvalue().splitlines()
    assert header.split() == ["step", "loss", "validation", "grad", "norm", "lr", "tok/s", "seconds"]
    assert line.split() == ["1", "2.5000", "-", "-", "0", "10", "1.0"]
    stream = io.StringIO()
    Console("grpo", stream=stream).step(StepMetrics(1, {"kl_policy": 0.0}))
    assert "kl old" in stream.getvalue()


def test_the_header_comes_back_now_and_then() -> None:
    stream = io.StringIO()
    console = Console("sft", stream=stream)
    for step in range(60):
        console.step(StepMetrics(step, {"loss": 1.0}))
    assert [n for n, line in enumerate(stream.getvalue().splitlines()) if "loss" in line] == [0, 26, 52]


def test_a_long_phase_reports_itself_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Console("grpo", stream=stream).progress("rollout", total=200) as advance:
        for _ in range(100):
            now += 1.0
            advance(2)
    assert stream.getvalue().splitlines() == [
        "rollout: 60/200 (30%) after 30 s",
        "rollout: 120/200 (60%) after 60 s",
        "rollout: 180/200 (90%) after 90 s",
    ]


def test_a_terminal_gets_colour_and_a_bar_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = Console("grpo", stream=stream)
    with console.progress("rollout", total=4) as advance:
        advance(3)
        with console.progress("inner", total=2) as inner:  # bars may be nested
            inner(1)
        console.step(StepMetrics(1, GRPO))
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "3/4" in text
    assert "inner" in text
    assert "0.4375" in text
    console.note("[red]markup is text[/red]")
    assert "[red]markup is text[/red]" in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    console = Console("grpo", stream=stream)
    with console.progress("rollout", total=4):
        console.step(StepMetrics(1, GRPO))
    assert "\x1b" not in stream.getvalue()


def test_other_ranks_are_silent() -> None:
    stream = Terminal()
    console = Console("grpo", enabled=False, stream=stream)
    console.step(StepMetrics(1, GRPO))
    console.note("x")
    console.warn("x")
    with console.progress("rollout", total=4) as advance, console.waiting("x"):
        advance(4)
    assert stream.getvalue() == ""


def test_escape_sequences_are_printed_as_text() -> None:
    """A warning may quote a file's name, a model's answer or an environment's error."""
    stream = io.StringIO()
    Console("sft", stream=stream).warn("rows of \x1b[2Jdata")
    assert stream.getvalue() == "WARNING: rows of \\x1b[2Jdata\n"
