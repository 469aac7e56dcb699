"""Console output of a run: one line per step, progress bars for long phases.

On a terminal (rich) lines are coloured, with progress bars below them. Elsewhere, e.g. in a log file, output
is plain lines without control codes, and a long phase prints its progress periodically.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from megarl.jobs import JOBS, Column
from megarl.metrics.checks import DIFFERENCE_LIMITS
from megarl.records import StepMetrics
from megarl.terminal import printable

_HEADER_EVERY = 25  # lines, so that a header is visible on most screens
_PLAIN_PROGRESS_SECONDS = 30.0  # interval of progress lines in a log

# Logprob mismatch above which the value is shown in yellow and in red.
_DIFFERENCE_LIMITS = (DIFFERENCE_LIMITS["float32"], DIFFERENCE_LIMITS["bfloat16"])


_GAP = "  "


class Console:
    """Prints the progress of a run. With ``enabled=False`` (ranks other than 0) all methods do nothing.

    Args:
        kind: the job, which has the columns of a step line.
        enabled: whether this rank prints.
        stream: output stream; None: standard output.
    """

    def __init__(self, kind: str, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._columns = JOBS[kind].columns
        self._enabled = enabled
        self._stream = sys.stdout if stream is None else stream
        self._rich: RichConsole | None = None
        if self._stream.isatty():
            rich = RichConsole(file=self._stream, highlight=False)
            self._rich = None if rich.is_dumb_terminal else rich
        self._progress: Progress | None = None
        self._log: TextIO | None = None
        self._lines_since_header = _HEADER_EVERY

    def keep_log(self, path: Path) -> None:
        """Also append all further lines to a file, even if the stream fails."""
        if self._enabled:
            with suppress(OSError):  # a full disk: the run's own files will say so
                self._log = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file of :meth:`keep_log`."""
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None

    def step(self, metrics: StepMetrics) -> None:
        """Print one aligned line of the job's columns; a missing value is a dash."""
        values = dict(metrics.values) | {"step": metrics.step}
        if values.get("seconds") and "num_tokens" in values:
            values["tokens_per_second"] = values["num_tokens"] / values["seconds"]
        sources = [next((name for name in c.sources if name in values), None) for c in self._columns]
        cells = list(zip(self._columns, sources, strict=True))
        if self._lines_since_header >= _HEADER_EVERY:
            titles = [c.sources[name] if name else next(iter(c.sources.values())) for c, name in cells]
            aligned = (title.rjust(c.width) for c, title in zip(self._columns, titles, strict=True))
            self._print(Text(_GAP.join(aligned), style="bold"))
            self._lines_since_header = 0
        self._lines_since_header += 1
        line = Text(_GAP).join(
            Text("-".rjust(c.width))
            if name is None
            else Text(_format(values[name], c).rjust(c.width), style=_style(name, values[name]))
            for c, name in cells
        )
        self._print(line)

    def note(self, message: str) -> None:
        """Print an information line."""
        self._print(Text(message, style="" if self._rich is None else "dim"))

    def warn(self, message: str) -> None:
        """Print a warning line."""
        self._print(Text(f"WARNING: {message}", style="bold yellow"))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of a phase; ``advance(n)`` adds n to the items done of ``total``."""
        with self._phase(label, total) as advance:
            yield advance

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show a phase of unknown length, and its duration at the end."""
        started = time.monotonic()
        with self._phase(label, None):
            yield
        self.note(f"{label}: ready after {time.monotonic() - started:.1f} s")

    @contextmanager
    def _phase(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        if not self._enabled:
            yield lambda count: None
        elif self._rich is None:
            yield self._plain_advance(label, total)
        else:
            outermost = self._progress is None
            progress = self._progress = self._progress or _new_progress(self._rich)
            if outermost:
                progress.start()
            task = progress.add_task(label, total=total)
            try:
                yield lambda count: progress.advance(task, count)
            finally:
                progress.remove_task(task)
                if outermost:
                    progress.stop()
                    self._progress = None

    def _plain_advance(self, label: str, total: int | None) -> Callable[[int], None]:
        started = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _PLAIN_PROGRESS_SECONDS:
                last = now
                share = f"/{total} ({done / total:.0%})" if total else ""
                self._print(Text(f"{label}: {done}{share} after {now - started:.0f} s"))

        return advance

    def _print(self, line: Text) -> None:
        if (safe := printable(line.plain)) != line.plain:
            line = Text(safe, style=line.style)
        if not self._enabled:
            return
        if self._log is not None:
            try:
                self._log.write(line.plain + "\n")
                self._log.flush()
            except OSError:
                self._log = None
        try:
            if self._rich is None:
                self._stream.write(line.plain + "\n")
                self._stream.flush()
            else:
                self._rich.print(line, soft_wrap=True)  # a narrow terminal wraps lines
        except OSError:
            self._lose_stream()

    def _lose_stream(self) -> None:
        """Continue without the stream: its reader has exited, its terminal was closed or its disk is full.

        Redirect it to /dev/null, since flushing its buffer at exit would fail again.
        """
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._rich = None


def _new_progress(console: RichConsole) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        console=console,
        transient=True,
    )


def _format(value: float, column: Column) -> str:
    if not math.isfinite(value):
        return str(value)
    match column.form:
        case "count":
            return f"{int(value)}"
        case "percent":
            return f"{value:.1%}"
        case "scientific":
            return "0" if value == 0 else f"{value:.1e}"
        case "thousands":
            return f"{value:,.0f}"
        case "seconds":
            return f"{value:.1f}" if value < 1e4 else f"{value:.0f}"
    for digits in (4, 3, 2, 1, 0):  # as many as fit, so that the column keeps its width
        text = f"{value:.{digits}f}"
        if len(text) <= column.width - 1:
            return text
    return f"{value:.1e}"


def _style(key: str, value: float) -> str:
    if not math.isfinite(value):
        return "bold red"
    if key == "logprob_abs_diff_max":
        warn, bad = _DIFFERENCE_LIMITS
        return "green" if value <= warn else "yellow" if value <= bad else "bold red"
    return "bold" if key in ("reward_mean", "accuracy", "loss", "validation_loss") else ""
