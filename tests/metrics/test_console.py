"""The console: aligned lines, no control codes off a terminal, silence on other ranks."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from megarl.metrics import console as console_module
from megarl.metrics import pace
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


def wait_for(text: str, stream: io.StringIO) -> None:
    deadline = time.monotonic() + 30
    while text not in stream.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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
    monkeypatch.setattr(console_module, "_SHORT_SECONDS", 0.0)
    console.detail("for the log alone")
    console.step(StepMetrics(1234, without | {"grad_norm": 12345.678, "kl_ref": float("nan")}))
    console.warn("mind [the] gap")
    with console.progress("rollout", total=8) as advance, console.waiting("engine"):
        advance(8)
        wait_for("engine ...", stream)
    text = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    header, first, second, warning, said, waited = text.splitlines()
    titles = re.split(r"\s{2,}", header.strip())
    shown = dict(zip(titles, first.split(), strict=True))
    assert shown == {
        "step": "7",
        "reward": "0.4375",
        "held-out acc": "61.7%",
        "kl ref": "1.2e-04",
        "logp diff": "3.1e-05",
        "grad norm": "0.8400",
        "lr": "1.0e-05",
        "length": "14.250",
        "tok/s": "4,500",
        "seconds": "2.0",
    }
    again = dict(zip(titles, second.split(), strict=True))
    assert (again["held-out acc"], again["kl ref"], again["grad norm"]) == ("-", "nan", "12345.68")
    ends = [match.end() for match in re.finditer(r"\S+", first)]
    assert ends == [match.end() for match in re.finditer(r"\S+", second)]
    assert len(header) == len(first) == len(second)
    assert warning == "WARNING: mind [the] gap"
    assert said == "engine ..."
    assert re.fullmatch(r"engine: \d+\.\d s", waited)


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


def test_a_title_is_that_of_what_is_printed_under_it() -> None:
    """Step 0 has no KL: it does not decide what the column is called."""
    stream = io.StringIO()
    console = Console("grpo", stream=stream)
    for step, values in enumerate(
        [{"accuracy": 0.5}, {"kl_policy": 0.5}, {"reward_mean": 1.0}, {"kl_policy": 1.0}]
    ):
        console.step(StepMetrics(step, values))
    lines = stream.getvalue().splitlines()
    titles = [line.split("held-out acc")[1].split("logp")[0].strip() for line in lines if "reward" in line]
    assert titles == ["kl", "kl old"]
    assert [line.split()[0] for line in lines] == ["step", "0", "step", "1", "2", "3"]


def printed_steps(total: int, interval: int | None, done: int = 0, **evaluated: range) -> list[int]:
    stream = io.StringIO()
    console = Console("sft", stream=stream)
    console.begin_steps(total, done, interval)
    for step in range(done + 1, total + 1):
        values = {"loss": 1.0} | {name: 1.0 for name, steps in evaluated.items() if step in steps}
        console.step(StepMetrics(step, values))
    return [int(line.split()[0]) for line in stream.getvalue().splitlines() if "loss" not in line]


def test_logging_interval_and_its_default() -> None:
    assert printed_steps(60, None) == list(range(1, 61))
    assert printed_steps(300, None, done=100) == [101, *range(102, 301, 3)]
    assert printed_steps(10, 4) == [1, 4, 8, 10]
    assert printed_steps(10, 10, validation_loss=range(3, 10, 3)) == [1, 3, 6, 9, 10]


def test_slow_steps_have_more_lines_unless_the_interval_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)

    def lines(interval: int | None) -> list[tuple[int, str]]:
        nonlocal now
        stream = io.StringIO()
        console = Console("sft", stream=stream)
        console.begin_steps(1000, 900, interval)
        for step in range(901, 913):
            now += 4.0
            console.step(StepMetrics(step, {"loss": 1.0}))
        rows = [line.split() for line in stream.getvalue().splitlines() if "loss" not in line]
        return [(int(row[0]), row[-1]) for row in rows]

    assert lines(None) == [(901, "6:36"), (904, "6:24"), (907, "6:12"), (910, "6:00")]
    assert lines(10) == [(901, "6:36"), (910, "6:00")]


def test_quiet_prints_warnings_alone_and_verbose_all(tmp_path: Path) -> None:
    shown = {}
    for level in console_module.LEVELS:
        stream = io.StringIO()
        console = Console("sft", level=level, stream=stream)
        console.keep_log(tmp_path / level)
        console.note("note")
        console.detail("detail")
        console.warn("mind")
        console.close()
        shown[level] = stream.getvalue().split()
        assert (tmp_path / level).read_text().split() == ["note", "detail", "WARNING:", "mind"]
    assert shown == {
        "quiet": ["WARNING:", "mind"],
        "normal": ["note", "WARNING:", "mind"],
        "verbose": ["note", "detail", "WARNING:", "mind"],
    }


def test_a_terminal_has_a_bar_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    console = Console("sft", stream=stream)
    console.begin_steps(8, 2)
    console.step(StepMetrics(4, {"loss": 0.1234}))
    wait_for("4/8", stream)  # the bar refreshes itself
    assert "50%" in stream.getvalue() and "sft  loss 0.1234" in stream.getvalue()
    console.close()
    assert "\x1b[?25h" in stream.getvalue()[-20:], "the cursor is back"
    quiet = Terminal()
    console = Console("sft", level="quiet", stream=quiet)
    console.begin_steps(8)
    with console.waiting("engine"), console.progress("rollout", 3):
        console.step(StepMetrics(1, {"loss": 1.0}))
    console.close()
    assert quiet.getvalue() == ""


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
