"""Examples of a source too large to hold, in windows of rows.

A window is an ordinary small dataset: ``streaming_window`` rows of the source, converted when the first of
them is drawn. Examples are numbered on through windows and epochs; megarl.data.order permutes those of a
window. What a run needs to go on is where the window of its next example begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from megarl.config.data import FileLocation, HfLocation
from megarl.data.report import LoadReport
from megarl.data.row_stream import Place, RowReader
from megarl.data.rows import Row
from megarl.errors import UserError

_Data = TypeVar("_Data")
_NUM_HELD = 2  # windows: a batch may lie across an edge


@dataclass(frozen=True)
class WindowStart:
    """Where a window begins.

    ``number`` is its number in epoch ``epoch``, ``first`` the number of its first example in the stream,
    ``before`` the examples before it in its epoch, and ``place`` where its rows begin.
    """

    epoch: int = 0
    number: int = 0
    first: int = 0
    before: int = 0
    place: Place = field(default_factory=dict)


@dataclass(frozen=True)
class Window(Generic[_Data]):
    """Examples ``start.first`` to ``end - 1`` of a stream; ``next`` is where the next window begins."""

    start: WindowStart
    data: _Data
    end: int
    next: WindowStart
    reports: list[LoadReport]


class ExampleStream(Generic[_Data]):
    """The examples of a source by number, 0, 1, ... without end; they are best drawn in about this order.

    Args:
        source: a file or dataset.
        field: its configuration key, e.g. ``data.train``.
        convert: makes a dataset (with a length) of the rows of a window; it fills the report and gets the
            number of examples before the window in its epoch.
    """

    def __init__(
        self,
        source: FileLocation | HfLocation,
        field: str,
        convert: Callable[[Iterable[Row], LoadReport, int], _Data],
    ) -> None:
        self._field, self._size, self._convert = field, source.streaming_window, convert
        self._rows = RowReader(source, field)
        self._starts = [WindowStart()]  # of windows in turn, at least one that was not read yet
        self._held: dict[int, Window[_Data]] = {}  # by the number of their first example
        self.share: Callable[[Callable[[], Window[_Data]]], Window[_Data]] = lambda read: read()
        """Reads a window, or gets it from the rank that does."""
        self.tell: Callable[[LoadReport], None] = lambda _: None
        """Called with the reports of each window that is read."""
        self.tick: Callable[[], None] = lambda: None
        """Called at every row that is read and every one that is converted."""

    def __getitem__(self, index: int) -> Any:
        window = self.window(index)
        data: Any = window.data
        return data[index - window.start.first]

    def window(self, index: int) -> Window[_Data]:
        """Return the window of example ``index``; it is read unless it is one of the last two."""
        while True:
            number = bisect_right(self._starts, index, key=lambda start: start.first) - 1
            assert number >= 0, f"example {index} lies before the place of the last checkpoint"
            window = self._window(number)
            if index < window.end:
                return window

    def place(self, index: int) -> dict[str, Any]:
        """Return the state from which :meth:`restore` goes on at example ``index``; forget what is before."""
        number = bisect_right(self._starts, index, key=lambda start: start.first) - 1
        del self._starts[:number]
        return asdict(self._starts[0])

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of :meth:`place`."""
        self._starts, self._held = [WindowStart(**state)], {}

    def _window(self, number: int) -> Window[_Data]:
        start = self._starts[number]
        if (held := self._held.get(start.first)) is not None:
            return held
        window = self.share(lambda: self._read(start))
        for report in window.reports:
            self.tell(report)
        if number == len(self._starts) - 1:
            self._starts.append(window.next)
        self._held[start.first] = window
        while len(self._held) > _NUM_HELD:
            del self._held[next(iter(self._held))]
        return window

    def _read(self, start: WindowStart) -> Window[_Data]:
        """Read the window that begins there, or the first one after it that has examples."""
        reports: list[LoadReport] = []
        while True:
            rows, place = self._rows.read(start.place, self._size, self.tick)
            ended = len(rows) < self._size
            if not rows and not start.number:
                raise UserError(f"{self._field}: holds no records")
            data: Any = []
            if rows:
                first = start.number * self._size + 1
                reports.append(LoadReport(f"{self._field}, rows {first:,} to {first + len(rows) - 1:,}"))
                data = self._convert(self._ticking(rows), reports[-1], start.before)
            end = start.first + len(data)
            after = (
                WindowStart(start.epoch + 1, first=end, place=place)
                if ended
                else WindowStart(start.epoch, start.number + 1, end, start.before + len(data), place)
            )
            if len(data):
                return Window(start, data, end, after, reports)
            if ended and not start.before:
                lines = [line for each in reports[-3:] for line in each.lines()]
                raise UserError("\n".join([f"{self._field}: no row is left to use", *lines]))
            start = after

    def _ticking(self, rows: list[Row]) -> Iterator[Row]:
        for row in rows:
            yield row
            self.tick()


def beginning(data: Any) -> Any:
    """Return the first window of a dataset that is a stream; another one whole."""
    return data if data.stream is None else data.stream.window(0).data


class Streamed:
    """Mix-in of datasets that are streams: items by their number, without a length."""

    stream: Any
    """An ExampleStream of the dataset's kind."""

    def __len__(self) -> int:
        """Raise TypeError, as streams of other libraries do."""
        raise TypeError("a stream has no length")

    def __getitem__(self, index: Any) -> Any:
        return self.stream[index]
