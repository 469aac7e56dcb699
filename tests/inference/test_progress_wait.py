"""Waiting for a start: limited by its progress, not by the clock alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.inference.progress_wait import kinds_of_lines, wait_while_progressing

PATIENCE = 0.3


def after(seconds: float) -> Callable[[float], bool]:
    """Done this many seconds from now."""
    ready = time.monotonic() + seconds

    def is_done(wait: float) -> bool:
        time.sleep(max(0.0, min(wait, ready - time.monotonic())))
        return time.monotonic() >= ready

    return is_done


def wait(is_done: Callable[[float], bool], progress: Callable[[float], Any]) -> tuple[bool, float]:
    start = time.monotonic()
    found = wait_while_progressing(is_done, progress, PATIENCE, interval=0.05)
    return found, time.monotonic() - start


def test_what_gets_on_is_waited_for_beyond_its_time() -> None:
    done, seconds = wait(after(4 * PATIENCE), lambda _: int(time.monotonic() / 0.1))
    assert done and seconds >= 4 * PATIENCE


@pytest.mark.parametrize("answer", [7, None], ids=["the same", "no answer"])
def test_what_does_not_is_given_up_in_time(answer: int | None) -> None:
    done, seconds = wait(after(60), lambda _: answer)
    assert not done and PATIENCE <= seconds < 4 * PATIENCE


def test_an_error_comes_out_at_once() -> None:
    def fails(_: float) -> bool:
        raise RuntimeError("it died")

    with pytest.raises(RuntimeError, match="it died"):
        wait(fails, lambda _: 0)


def test_a_line_that_is_said_again_is_no_progress(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert kinds_of_lines(log) == 0
    log.write_text("12:01 loading\n12:02 no block found in 60 s\n")
    before = kinds_of_lines(log)
    with log.open("a") as stream:
        stream.write("12:03 no block found in 120 s\n")
    assert kinds_of_lines(log) == before == 2
