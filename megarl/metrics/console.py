"""Console output of a run: what it is doing, a line every few steps, a bar with the time left.

On a terminal (rich) lines are coloured, with bars below them: of the run, and of what goes on. Elsewhere,
e.g. in a log file, output is plain lines without control codes, and a long phase says so periodically.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO, get_args

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from megarl.jobs import JOBS, Column
from megarl.metrics.checks import DIFFERENCE_LIMITS
from megarl.metrics.pace import Pace
from megarl.records import StepMetrics
from megarl.terminal import beside, printable

_HEADER_EVERY = 25  # lines, so that a header is visible on most screens
_PLAIN_PROGRESS_SECONDS = 30.0  # interval of progress lines in a log
_SHORT_SECONDS = 1.0  # phases that are not worth a line

Level = Literal["quiet", "normal", "verbose"]
LEVELS: tuple[Level, ...] = get_args(Level)

# Logprob mismatch above which the value is shown in yellow and in red.
_DIFFERENCE_LIMITS = (DIFFERENCE_LIMITS["float32"], DIFFERENCE_LIMITS["bfloat16"])

_EVALUATED = ("accuracy", "validation_loss", "validation_accuracy")
_GAP = "  "

_level: Level = "normal"


def use_level(level: Level) -> None:
    """Set the level of the consoles that this process makes from now on."""
    global _level
    _level = level


class Console:
    """Prints the progress of a run. With ``enabled=False`` (ranks other than 0) all methods do nothing.

    Args:
        kind: the job, which has the columns of a step line.
        enabled: whether this rank prints.
        level: quiet: warnings only; verbose: details too; None: what :func:`use_level` set. A log
            (:meth:`keep_log`) has all of normal in any case.
        stream: output stream; None: standard output.
    """

    def __init__(
        self,
        kind: str,
        *,
        enabled: bool = True,
        level: Level | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._kind, self._columns = kind, JOBS[kind].columns
        self._enabled, self._level = enabled, level or _level
        self._stream = sys.stdout if stream is None else stream
        self._rich: RichConsole | None = None
        if self._stream.isatty():
            rich = RichConsole(file=self._stream, highlight=False)
            self._rich = None if rich.is_dumb_terminal else rich
        self._progress: Progress | None = None
        self._log: TextIO | None = None
        self._lock = threading.RLock()  # of output: a phase reports itself from a thread
        self._titles: list[str] = []
        self._lines_since_header = _HEADER_EVERY
        self._pace: Pace | None = None
        self._steps_task: TaskID | None = None

    @property
    def is_verbose(self) -> bool:
        """Whether details are printed."""
        return self._level == "verbose"

    def keep_log(self, path: Path) -> None:
        """Also append all further lines to a file, even if the stream fails."""
        if self._enabled:
            with suppress(OSError):  # a full disk: the run's own files will say so
                self._log = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file of :meth:`keep_log`."""
        self.end_steps()
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None

    # --- steps ----------------------------------------------------------------------------------

    def begin_steps(self, total: int, done: int = 0, interval: int | None = None) -> None:
        """Show a bar with the time left until step ``total`` from now on, ``done`` steps being done.

        ``interval`` is the number of steps per line; None: about 1% of ``total``, or 10 s if that is sooner.
        First, last and evaluated steps always have a line.
        """
        self._pace = Pace(total, done, interval)
        if self._enabled and self._shows_bars:
            self._steps_task = self._open_bars().add_task(self._kind, total=total, completed=done)

    def end_steps(self) -> None:
        """Remove the bar of :meth:`begin_steps`."""
        self._pace = None
        if self._steps_task is not None:
            task, self._steps_task = self._steps_task, None
            self._close_bar(task)

    def step(self, metrics: StepMetrics) -> None:
        """Print one aligned line of the job's columns, if one is due; a missing value is a dash."""
        if not self._enabled:
            return
        values = dict(metrics.values) | {"step": metrics.step}
        if values.get("seconds") and "num_tokens" in values:
            values["tokens_per_second"] = values["num_tokens"] / values["seconds"]
        sources = [next((name for name in c.sources if name in values), None) for c in self._columns]
        cells = [
            (_format(values[name], c) if name else "-", c.width, _style(name, values[name]) if name else "")
            for c, name in zip(self._columns, sources, strict=True)
        ]
        titles = [
            c.sources[name] if name else c.title for c, name in zip(self._columns, sources, strict=True)
        ]
        if self._pace is not None:
            is_due = self._pace.advance(metrics.step, is_evaluated=any(name in values for name in _EVALUATED))
            self._move_bar(metrics.step, titles, cells)
            if not is_due:
                return
            cells.append((self._pace.time_left() or "-", 8, ""))
            titles.append("left")
        if len(self._titles) == len(titles):  # a row that lacks a metric does not know which one it would be
            unknown = [name is None for name in sources] + [False] * (len(titles) - len(sources))
            titles = [old if u else new for old, new, u in zip(self._titles, titles, unknown, strict=True)]
        if self._lines_since_header >= _HEADER_EVERY or titles != self._titles:
            aligned = (title.rjust(width) for title, (_, width, _) in zip(titles, cells, strict=True))
            self._print(Text(_GAP.join(aligned), style="bold"))
            self._titles, self._lines_since_header = titles, 0
        self._lines_since_header += 1
        self._print(Text(_GAP).join(Text(text.rjust(width), style=style) for text, width, style in cells))

    def _move_bar(self, step: int, titles: list[str], cells: list[tuple[str, int, str]]) -> None:
        if self._steps_task is not None and self._progress is not None:
            shown = f"{self._kind}  {titles[1]} {cells[1][0].strip()}" if len(cells) > 1 else self._kind
            self._progress.update(self._steps_task, completed=step, description=shown)

    # --- lines ----------------------------------------------------------------------------------

    def note(self, message: str) -> None:
        """Print an information line."""
        self._print(Text(message, style="" if self._rich is None else "dim"))

    def detail(self, message: str) -> None:
        """Print a line for those who look into a run: on the stream only if verbose, in the log always."""
        self._print(Text(message, style="" if self._rich is None else "dim"), needs="verbose")

    def warn(self, message: str) -> None:
        """Print a warning line."""
        self._print(Text(f"WARNING: {message}", style="bold yellow"), needs="quiet")

    # --- phases ---------------------------------------------------------------------------------

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of a phase; ``advance(n)`` adds n to the items done of ``total``."""
        if not self._enabled:
            yield lambda count: None
        elif not self._shows_bars:
            yield self._plain_advance(label, total)
        else:
            progress = self._open_bars()
            task = progress.add_task(label, total=total)
            try:
                yield lambda count: progress.advance(task, count)
            finally:
                self._close_bar(task)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show a phase of unknown length while it lasts, and how long it took unless that was short.

        Off a terminal a line says what goes on after a second, and again every half minute.
        """
        started = time.monotonic()
        if not self._enabled:
            yield
            return
        if self._shows_bars:
            task = self._open_bars().add_task(label, total=None)
            try:
                yield
            finally:
                self._close_bar(task)
        else:
            with self._announced(label, started):
                yield
        took = time.monotonic() - started
        say = self.note if took >= _SHORT_SECONDS else self.detail
        say(f"{label}: {took:.1f} s")

    def _announced(self, label: str, started: float) -> AbstractContextManager[None]:
        """Say in lines, from a thread, that the phase is going on."""

        def announce(over: threading.Event) -> None:
            if over.wait(_SHORT_SECONDS):
                return
            self.note(f"{label} ...")
            while not over.wait(_PLAIN_PROGRESS_SECONDS):
                self.note(f"{label} ... {time.monotonic() - started:.0f} s")

        return beside(announce)

    @property
    def _shows_bars(self) -> bool:
        return self._rich is not None and self._level != "quiet"

    def _open_bars(self) -> Progress:
        """Return the bars of the terminal, started."""
        assert self._rich is not None
        if self._progress is None:
            self._progress = _new_progress(self._rich)
            self._progress.start()
        return self._progress

    def _close_bar(self, task: TaskID) -> None:
        """Remove a bar; the last one leaves the terminal."""
        if self._progress is not None:
            self._progress.remove_task(task)
            if not self._progress.task_ids:
                self._progress.stop()
                self._progress = None

    def _plain_advance(self, label: str, total: int) -> Callable[[int], None]:
        started = last = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _PLAIN_PROGRESS_SECONDS:
                last = now
                share = f"/{total} ({done / total:.0%})" if total else ""
                self.note(f"{label}: {done}{share} after {now - started:.0f} s")

        return advance

    def _print(self, line: Text, needs: Level = "normal") -> None:
        """Print a line on the stream if the level includes ``needs``, and in the log."""
        if (safe := printable(line.plain)) != line.plain:
            line = Text(safe, style=line.style)
        if not self._enabled:
            return
        with self._lock:
            self._write(line, on_stream=LEVELS.index(needs) <= LEVELS.index(self._level))

    def _write(self, line: Text, *, on_stream: bool) -> None:
        if self._log is not None:
            try:
                self._log.write(line.plain + "\n")
                self._log.flush()
            except OSError:
                self._log = None
        if not on_stream:
            return
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
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
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
